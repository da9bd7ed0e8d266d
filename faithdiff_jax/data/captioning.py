"""Captions for a folder of pictures, from a vision-language model: one `{"caption": ...}` file a picture.

folder -> `plan` (what is still to do) -> pictures in batches -> `Captioner` -> files, each whole or not at all

The one part of the data that needs PyTorch: the models are those of transformers, at any size.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import Box, describe_boxes, write_caption
from faithdiff_jax.files.images import load_image
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_pictures
from faithdiff_jax.files.reading import printable

MODEL = "llava-hf/llava-1.5-7b-hf"
LONGEST_NAME = 255  # bytes of a file name, on the usual file systems
PROMPT = "Describe this image and its style in a very detailed manner."
LLAVA_TEMPLATE = "USER: {image}\n{prompt} ASSISTANT:"


class PictureRefused(ValueError):
    """The model's processor cannot take a picture, for its proportions for instance."""


@dataclass(frozen=True)
class Job:
    """A picture to look at, and the file its caption goes to."""

    picture: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """What there is to do in a folder: jobs; how many captions are there already; one line a picture without a job."""

    jobs: list[Job]
    done: int
    faults: list[str]


def plan(pictures: Path, output: Path, cleaned: Path | None = None) -> Plan:
    """Find the pictures under a folder, at any depth, and the captions that `output` has no file for yet.

    `output` gets the folders of `pictures`, and `cat.json` for `cat.png`. With `cleaned`, the picture of the same path
    and name there, with whatever suffix, is looked at instead; where it is missing, the picture gets no job but a
    fault: captions of two kinds in one folder could not be told apart. Folders that cannot be listed, and pipes and
    devices with the name of a picture, are faults too, and stop no others.

    Raises:
        InputError: there are no pictures, two would get the same file, or `cleaned` has none of them.
    """
    targets, faults = _by_stem(pictures)
    stand_ins, more = (None, []) if cleaned is None else _by_stem(cleaned)
    faults += more
    jobs, done = [], 0
    for stem, picture in targets.items():
        target = output / f"{picture.relative_to(pictures).with_suffix('')}.json"
        source = picture if stand_ins is None else stand_ins.get(stem)
        if os.path.exists(target):
            done += 1
        elif len(os.fsencode(target.name)) > LONGEST_NAME:
            faults.append(f"{printable(picture)}: its name is too long for a caption file's, shorten it")
        elif source is None:
            faults.append(f"{printable(picture)}: {cleaned} holds no cleaned-up picture of that name")
        else:
            jobs.append(Job(source, target))
    if stand_ins is not None and not targets.keys() & stand_ins.keys() and not done:
        raise InputError(f"{cleaned}: holds a cleaned-up picture for none of those in {pictures}")
    return Plan(jobs, done, faults)


Clean = Callable[[np.ndarray], np.ndarray]
"""Makes a picture, (H, W, 3) uint8, easier to describe: as the published script removes its degradation first."""


def caption_pictures(captioner: "Captioner", jobs: Sequence[Job], batch: int, clean: Clean | None = None) -> list[str]:
    """Caption `batch` pictures at a time, and return one line for each that could not be captioned.

    Raises InputError if a file cannot be written or the memory does not suffice: the other pictures would fare alike.
    """
    faults: list[str] = []
    targets = {job.picture: job.target for job in jobs}
    for picture, caption in describe(captioner, list(targets), batch, clean):
        if isinstance(caption, InputError):
            faults.append(str(caption))
        else:
            write_caption(targets[picture], caption)
    return faults


def describe(
    captioner: "Captioner", pictures: Sequence[Path], batch: int = 1, clean: Clean | None = None
) -> Iterator[tuple[Path, str | InputError]]:
    """Yield each picture with its caption, or with why it has none; `batch` are looked at together.

    Raises InputError if the memory does not suffice.
    """
    with tqdm(total=len(pictures), unit="picture", disable=None) as bar:
        loaded: list[tuple[Path, np.ndarray]] = []
        for i, path in enumerate(pictures):
            try:
                loaded.append((path, _load_clean(path, clean)))
            except InputError as error:
                yield path, error
            if len(loaded) == batch or i + 1 == len(pictures):
                captions = _caption_each(captioner, [picture for _, picture in loaded]) if loaded else []
                for (source, _), caption in zip(loaded, captions, strict=True):
                    yield source, _told(source, caption)
                bar.update(len(loaded))
                loaded = []


def describe_parts(
    captioner: "Captioner",
    pictures: Sequence[Path],
    parts: Callable[[tuple[int, int]], Sequence[Box]],
    clean: Clean | None = None,
) -> Iterator[tuple[Path, list[str] | InputError]]:
    """Yield each picture with a caption of each of its parts, or with why it has none; a part is looked at once.

    `parts` gives them, of a picture's height and width. Raises InputError if the memory
    does not suffice.
    """
    for path in tqdm(pictures, unit="picture", disable=None):
        try:
            picture = _load_clean(path, clean)
            boxes = parts(picture.shape[:2])
        except InputError as error:
            yield path, error
            continue
        captions = describe_boxes(picture, boxes, lambda part: _caption_each(captioner, [part])[0])
        told = [_told(path, caption) for caption in captions]
        faults = [one for one in told if isinstance(one, InputError)]
        yield path, faults[0] if faults else list(map(str, told))


def require_torch() -> Any:
    """Import PyTorch; InputError that names the extra if it is not installed."""
    try:
        import torch
    except ImportError:
        raise InputError("captioning needs PyTorch: pip install 'faithdiff-jax[caption]'") from None
    return torch


class Captioner:
    """An image-text-to-text model of transformers with its processor, asked the same question about every picture.

    Decoding is greedy, so that a picture gets the same caption every time. In half precision, pictures that share a
    batch can change one another's rounding, and with it a word where two are almost equally likely.
    """

    def __init__(self, model: Any, processor: Any, prompt: str = PROMPT, max_tokens: int = 200):
        self._model, self._processor = model, processor
        self._prompt = _fill_template(processor, prompt)
        tokenizer = processor.tokenizer
        # Prompts can differ in length, as large pictures become more tokens; what is generated must follow directly.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Some templates begin with the token that the tokenizer would put in front a second time.
        self._adds_start = not (tokenizer.bos_token and self._prompt.startswith(tokenizer.bos_token))
        self._decoding = _greedy(model.generation_config, tokenizer, max_tokens)

    @classmethod
    def load(
        cls,
        name: str = MODEL,
        *,
        prompt: str = PROMPT,
        max_tokens: int = 200,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "Captioner":
        """Load a model from a local folder, or by its Hugging Face name.

        `device` "auto" is a GPU where PyTorch sees one; `dtype` "auto" is the one the weights are stored in on a GPU,
        and float32 elsewhere. Raises InputError without PyTorch, without the device, and for a model that cannot be
        found or loaded, is of another kind, or whose weights are not complete.
        """
        torch = require_torch()
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda: PyTorch sees no GPU here, use cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        model, processor = _load(name, dtype if dtype == "auto" else getattr(torch, dtype))
        return cls(model.to(device).eval(), processor, prompt, max_tokens)

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Caption pictures, each (H, W, 3) uint8 of any size, as one batch; without white space around the text.

        Raises PictureRefused if the processor cannot take one of them, InputError if memory does not suffice.
        """
        torch = require_torch()
        try:
            inputs = self._processor(
                # A list for each prompt: processors that allow for several pictures in one insist on it.
                images=[[Image.fromarray(picture)] for picture in pictures],
                text=[self._prompt] * len(pictures),
                return_tensors="pt",
                padding=True,
                add_special_tokens=self._adds_start,
            )
        except ValueError as error:
            raise PictureRefused(str(error)) from error
        inputs = inputs.to(self._model.device, dtype=self._model.dtype)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(**inputs, generation_config=self._decoding)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory with {len(pictures)} pictures, use a smaller --batch or --dtype"
            ) from error
        if not self._model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Pictures under a folder by their path without suffix, and a line for each entry that is of no use.

    Case does not count, as in some file systems.
    """
    listing = list_pictures(folder, deep=True)
    if not listing.names:
        raise InputError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)}) there, at any depth")
    found: dict[str, Path] = {}
    for name in listing.names:
        path = folder / name
        other = found.setdefault(name.rpartition(".")[0].casefold(), path)
        if other != path:
            raise InputError(f"{other} and {path}: would be the same caption file, rename one")
    return found, [*listing.unreadable, *listing.skipped]


def _load_clean(path: Path, clean: Clean | None) -> np.ndarray:
    picture = load_image(path).rgb
    if clean is None:
        return picture
    try:
        return clean(picture)
    except InputError as error:  # of a picture that came from no file
        raise InputError(f"{path}: {error}") from None


def _told(source: Path, caption: str | PictureRefused) -> str | InputError:
    """A caption, or why there is none, as people read it."""
    if isinstance(caption, PictureRefused):
        return InputError(f"{source}: the model's processor refuses the picture ({_first_line(caption)})")
    return caption or InputError(f"{source}: the model said nothing about it")


def _caption_each(captioner: Captioner, pictures: list[np.ndarray]) -> list[str | PictureRefused]:
    """Caption a batch; if the processor refuses it, one by one, so that only those at fault go without."""
    try:
        return list(captioner(pictures))
    except PictureRefused as refusal:
        if len(pictures) == 1:
            return [refusal]
        return [outcome for picture in pictures for outcome in _caption_each(captioner, [picture])]


def _fill_template(processor: Any, prompt: str) -> str:
    """Put the prompt and the picture's place into the processor's chat template, or else into LLaVA-1.5's."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    image = getattr(processor, "image_token", "<image>")
    if image not in processor.tokenizer.get_vocab():
        raise InputError(
            f"the model has no chat template, and no token {image} that LLaVA's template could use instead"
        )
    return LLAVA_TEMPLATE.format(image=image, prompt=prompt)


def _greedy(published: Any, tokenizer: Any, max_tokens: int) -> Any:
    """The model's own settings for generating text (end tokens, penalties), made greedy."""
    settings = copy.deepcopy(published)
    settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
    settings.update(max_new_tokens=max_tokens, max_length=None)
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return settings


def _load(name: str, dtype: Any) -> tuple[Any, Any]:
    """Load model and processor; whatever goes wrong becomes one line."""
    import transformers

    library: Any = transformers  # untyped in parts

    if not os.path.isdir(name) and (os.path.exists(name) or name.count("/") != 1):
        raise InputError(f"{name}: no such folder (and a Hugging Face name is owner/name)")
    # The errors are those of four libraries, down to bare Exception for a file that cannot be parsed.
    try:
        processor = library.AutoProcessor.from_pretrained(name)
        # Left to choose, the library resizes with torchvision where it is installed, and captions would depend on that.
        processor.image_processor = library.AutoImageProcessor.from_pretrained(name, backend="pil")
        loaded = library.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise InputError(f"{name}: the model cannot be loaded ({_first_line(error)})") from error
    if not hasattr(processor, "tokenizer"):
        raise InputError(f"{name}: has no processor for pictures and text, so it is not an image-text-to-text model")
    model, report = loaded
    # Left to itself, the library gives such tensors random values and goes on.
    absent = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if absent:
        raise InputError(f"{name}: {len(absent)} tensors are missing or of another shape, the first is {absent[0]}")
    return model, processor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
