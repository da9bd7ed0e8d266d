"""A loaded model with a queue before it: what the HTTP API and the page are made on."""

import contextlib
import dataclasses
import pathlib
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from faithdiff_jax import __version__
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import OF_TILES, Box, Caption, describe_boxes, too_long, trim_caption
from faithdiff_jax.files.reading import parse_json
from faithdiff_jax.inference.loading import chosen
from faithdiff_jax.inference.making import Making
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.restoration import pictures_together
from faithdiff_jax.inference.tile_captions import check_caption, tile_boxes
from faithdiff_jax.service.forms import changed, public
from faithdiff_jax.service.jobs import Job
from faithdiff_jax.service.queue import Busy, JobQueue
from faithdiff_jax.service.settings import ServiceOptions
from faithdiff_jax.service.uploads import check_picture, read_picture
from faithdiff_jax.service.worker import Explain, Worker

if TYPE_CHECKING:
    from faithdiff_jax.inference.pipeline import FaithDiff

CAPTIONS_WAITING = 8
"""Pictures that wait to be described; others are sent away."""

Describe = Callable[[list[Any]], list[str]]
"""Pictures (H, W, 3) -> what they show, as `data.captioning.Captioner` has it."""


class Service:
    """Takes pictures on, and has them restored.

    Attributes:
        model: loaded.
        settings: of the service.
        defaults: options of a request that names none.
        presets: name -> options.
        queue: all jobs.
        folder: private to this process; everything that is sent and made lies there until `close`.
        explain: see `worker.Explain`.
    """

    def __init__(
        self,
        model: "FaithDiff",
        settings: ServiceOptions,
        making: Making,
        explain: Explain,
        *,
        own: Mapping[str, Any] | None = None,
        describe: Describe | None = None,
    ):
        """Begin with an empty queue; `start` begins the work.

        Args:
            model: that restores.
            settings: of the service.
            making: what results say of how they were made; its options are each request's.
            explain: what is said of errors.
            own: options that the service has chosen, over the model's defaults and presets.
            describe: what captions pictures, if anything does.
        """
        own = own or {}
        self.model, self.settings, self.explain = model, settings, explain
        self.defaults = model.defaults.replace(**own)
        self.presets = {name: options.replace(**own) for name, options in model.presets.items()}
        self.queue = JobQueue(settings)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-serve-"))  # of mode 0700
        self._worker = Worker(model, self.queue, making, explain)
        self._describe, self._describing = describe, threading.Lock()
        self._captions = threading.BoundedSemaphore(CAPTIONS_WAITING)

    @property
    def captions(self) -> bool:
        """Whether pictures can be described."""
        return self._describe is not None

    def start(self) -> None:
        """Begin to restore."""
        self._worker.start()

    def close(self, patience: float = 60) -> None:
        """Take on no more, wait so many seconds for what is in hand, and remove the private folder."""
        self.queue.close()
        if self._worker.is_alive():
            self._worker.join(patience)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """`start`, and `close` at the end."""
        self.start()
        try:
            yield
        finally:
            self.close()

    def options(self, texts: Mapping[str, str]) -> tuple[Caption, RestoreOptions]:
        """The caption, or those of tiles, and the options of a form's fields of text.

        Raises:
            InputError: an unknown preset or option, a value of another kind or out of its range, or that the model
                cannot do.
        """
        texts = dict(texts)
        caption: Caption = texts.pop("caption", "")
        of_tiles, preset = texts.pop(OF_TILES, ""), texts.pop("preset", None)
        if of_tiles.strip():
            caption = parse_json(of_tiles, OF_TILES)
            if not isinstance(caption, list) or not all(isinstance(one, str) for one in caption):
                raise InputError(f"{OF_TILES}: must be a JSON list of strings, one for each tile")
        options = self.defaults if preset is None else chosen(self.presets, preset)
        options = changed(options, texts)
        options.check_against(self.model.config)
        return caption, options

    def file(self) -> pathlib.Path:
        """A new name in the private folder."""
        return self.folder / secrets.token_hex(16)

    @contextlib.contextmanager
    def file_for_now(self) -> Iterator[pathlib.Path]:
        """A name in the private folder, of a file that is removed at the end."""
        path = self.file()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def receiving(self) -> Iterator[pathlib.Path]:
        """A place in the queue, and a name for the file that is sent; it is removed if no job is made of it.

        Raises:
            Busy: no place.
        """
        with self.queue.place():
            path = self.file()
            try:
                yield path
            except BaseException:
                path.unlink(missing_ok=True)
                raise

    def accept(self, path: pathlib.Path, name: str, texts: Mapping[str, str]) -> Job:
        """Look at a picture and put it into the queue; called inside `receiving`.

        Raises:
            InputError: what is wrong with the picture, an option, or the two together.
        """
        caption, options = self.options(texts)
        height, width = check_picture(path, name, self.settings.max_pixels)
        size = self._checked_size(options, height, width)
        check_caption(caption, options, self.model.config, (height, width))
        alike = dataclasses.replace(options, seed=0), (height, width) if options.progressive else size
        job = Job(
            id=secrets.token_urlsafe(16),
            source=path,
            target=path.with_name(f"{path.name}.png"),
            name=name,
            size=(height, width),
            caption=caption,
            options=options,
            alike=alike,
            together=pictures_together(options, self.model.config, size),
            steps=options.evaluated_steps * len(options.enlargements),
            notes=too_long(caption),
        )
        self.queue.add(job)
        return job

    def caption(self, path: pathlib.Path, name: str) -> str:
        """What a picture shows, trimmed as in training.

        Raises:
            InputError: nothing here describes pictures, or this one cannot be.
            Busy: too many wait already.
        """
        return self._described(path, name, lambda height, width: [(0, 0, width, height)])[0]

    def tile_captions(self, path: pathlib.Path, name: str, texts: Mapping[str, str]) -> list[str]:
        """What each tile of a picture shows that is restored with a form's options; otherwise as `caption`."""
        _, options = self.options(texts)

        def boxes(height: int, width: int) -> list[Box]:
            self._checked_size(options, height, width)
            return tile_boxes(options, self.model.config, (height, width))

        return self._described(path, name, boxes)

    def _described(self, path: pathlib.Path, name: str, parts: Callable[[int, int], Sequence[Box]]) -> list[str]:
        """What each part of a picture shows."""
        if self._describe is None:
            raise InputError("this service describes no pictures: it was started without --captioner")
        if not self._captions.acquire(blocking=False):
            raise Busy(f"{CAPTIONS_WAITING} pictures wait to be described, ask again in 10 s", 10)
        try:
            picture = read_picture(path, name, self.settings.max_pixels).rgb
            boxes, describe = parts(*picture.shape[:2]), self._describe
            with self._describing:
                return describe_boxes(picture, boxes, lambda part: trim_caption(*describe([part])))
        finally:
            self._captions.release()

    def limits(self) -> str:
        """What a picture may be, in words."""
        settings = self.settings
        sizes = f"{settings.max_pixels:,} pixels, {settings.max_result_pixels:,} restored"
        return f"at most {settings.max_bytes:,} bytes, {sizes}"

    def described(self) -> dict[str, Any]:
        """The model and what it takes, as plain data."""
        limits = ("max_bytes", "max_pixels", "max_result_pixels", "queue", "keep")
        return {
            "version": __version__,
            "defaults": public(self.defaults),
            "presets": {name: public(options) for name, options in self.presets.items()},
            "limits": {name: getattr(self.settings, name) for name in limits},
            "captions": self.captions,
        }

    def _checked_size(self, options: RestoreOptions, height: int, width: int) -> tuple[int, int]:
        """The padded size; an InputError names the size and what would be right."""
        target_height, target_width = images.target_size(height, width, options.scale)
        most = self.settings.max_result_pixels
        if target_height * target_width > most:
            sizes = f"{width}x{height} into {target_width}x{target_height} pixels"
            raise InputError(f"scale is {options.scale:g}: turns {sizes}, at most {most:,} are restored")
        return options.padded_size(self.model.config, height, width)
