"""The page: a picture, its caption and options, a slider between before and after, and what was done before.

It is a client of `Service` in the same process, and has no way around it: what it sends waits in the same queue.
"""

import asyncio
import html
import io
import json
import os
import pathlib
import shutil
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import numpy as np
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from PIL import Image

from faithdiff_jax.errors import InputError, RunError
from faithdiff_jax.files import images
from faithdiff_jax.files.captions import OF_TILES
from faithdiff_jax.files.reading import printable
from faithdiff_jax.files.sheets import at_most
from faithdiff_jax.service.controls import add_controls, shown_values, texts_of
from faithdiff_jax.service.jobs import Job, JobState
from faithdiff_jax.service.service import Service
from faithdiff_jax.service.uploads import read_picture

PATH = "/page"
SHOWN_SIDE = 1536
"""In pixels: larger pictures are shown reduced; the file to download is whole."""
THUMBNAIL = 320
REMEMBERED = 12
"""Results in a page's history."""
GLANCE = 0.1
"""Seconds between two looks at a job."""
PREVIEW_EVERY = 2.0
"""Seconds from one preview to the next: each costs what decoding the picture costs."""
STYLE = """
footer { display: none !important }
#status { min-height: 1.6em } #status p { font-size: 1rem }
"""


def mount(app: FastAPI, service: Service) -> FastAPI:
    """The API with the page at `PATH`, to which / leads."""
    os.environ["GRADIO_TEMP_DIR"] = str(service.folder / "page")  # nothing that is sent goes elsewhere
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    @app.get("/", include_in_schema=False)
    async def front() -> RedirectResponse:
        return RedirectResponse(f".{PATH}/")

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        Page(service).build(),
        path=PATH,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        max_file_size=service.settings.max_bytes,
        theme=theme,
        css=STYLE,
    )
    return mounted


class Page:
    """What the page shows and does."""

    def __init__(self, service: Service):
        self._service = service

    def build(self) -> Any:
        """The page, as Gradio's blocks."""
        import gradio as gr

        service, keep = self._service, self._service.settings.keep
        with gr.Blocks(title="FaithDiff", analytics_enabled=False, delete_cache=(min(keep, 600), keep)) as page:
            gr.Markdown("# FaithDiff\nRestores photographs faithfully.")
            job = gr.State("")
            history = gr.State([], time_to_live=keep)
            with gr.Row():
                with gr.Column(scale=2):
                    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", height=300)
                    _take_as_sent(picture)
                    caption = gr.Textbox(label="Caption", info="what the picture shows", lines=2, elem_id="caption")
                    if service.captions:
                        describe = gr.Button("Describe the picture", elem_id="describe")
                        describe.click(self.describe, [picture], [caption], api_visibility="private")
                    names = list(service.presets)
                    preset = gr.Dropdown(
                        ["", *names], value="", label="Preset", visible=bool(names), elem_id="preset",
                        info="the model's own choice of all options",
                    )  # fmt: skip
                    with gr.Row():
                        restore = gr.Button("Restore", variant="primary", elem_id="restore")
                        stop = gr.Button("Stop", elem_id="stop")
                    controls = add_controls(service.defaults)
                    with gr.Accordion("Captions of tiles", open=False):
                        tiles = gr.Textbox(
                            label="Tile captions", lines=4, elem_id="tile-captions",
                            info="instead of the caption: a line for each tile, from left to right and then down",
                        )  # fmt: skip
                        if service.captions:
                            each = gr.Button("Describe each tile", elem_id="describe-tiles")
                            values = [picture, *controls.values()]
                            each.click(self.describe_tiles, values, [tiles], api_visibility="private")
                with gr.Column(scale=3):
                    status = gr.Markdown("", elem_id="status")
                    preview = gr.Image(
                        label="So far", visible=False, interactive=False, format="jpeg", elem_id="preview"
                    )
                    slider = gr.ImageSlider(
                        label="Before, enlarged, and after", format="png", interactive=False, elem_id="slider",
                        max_height=900,
                    )  # fmt: skip
                    link = gr.HTML("", elem_id="download")
                    gallery = gr.Gallery(
                        label="Earlier results", columns=4, height=240, object_fit="contain", interactive=False,
                        allow_preview=False, format="png", elem_id="history", buttons=[],
                    )  # fmt: skip
            # Nobody else need know of these: programs have the API.
            hidden = {"api_visibility": "private"}
            inputs = [picture, caption, tiles, history, *controls.values()]
            outputs = [job, status, preview, slider, link, history, gallery]
            preset.change(self.choose, [preset], list(controls.values()), **hidden)
            restore.click(self.restore, inputs, outputs, concurrency_limit=None, show_progress="hidden", **hidden)
            stop.click(self.stop, [job], [status], **hidden)

            def again(history: list[dict[str, str]], event: gr.SelectData) -> tuple[Any, str, str]:
                return self.again(history, event.index)

            gallery.select(again, [history], [slider, link, status], **hidden)
        page.has_launched = True  # or else Gradio takes any file of this machine for one that was sent
        page.queue(max_size=4 * service.settings.queue)
        return page

    def choose(self, preset: str) -> list[Any]:
        """The controls of a preset."""
        chosen = self._service.presets.get(preset, self._service.defaults)
        return shown_values(chosen)

    async def describe(self, picture: str | None) -> str:
        """What the picture shows."""
        try:
            path = self._sent(picture)
            return await anyio.to_thread.run_sync(self._service.caption, path, path.name)
        except (InputError, RunError) as error:
            raise _told(error) from None

    async def describe_tiles(self, picture: str | None, *values: Any) -> str:
        """What each tile shows, line by line."""
        try:
            path, texts = self._sent(picture), texts_of(values)
            captions = await anyio.to_thread.run_sync(self._service.tile_captions, path, path.name, texts)
        except (InputError, RunError) as error:
            raise _told(error) from None
        return "\n".join(" ".join(one.split()) for one in captions)

    async def restore(
        self, picture: str | None, caption: str, tiles: str, history: list[dict[str, str]], *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Put the picture into the queue, and show how far it is until it is done."""
        import gradio as gr

        same = gr.skip()
        texts = {"caption": caption or "", **texts_of(values)}
        if (tiles or "").strip():
            texts[OF_TILES] = json.dumps(tiles.splitlines())
        try:
            job = await self._accepted(picture, texts)
        except (InputError, RunError) as error:
            raise _told(error) from None
        hidden = gr.update(visible=False)
        yield job.id, self._status(job), hidden, same, "", same, same
        seen, looked = "", 0.0
        while not job.final:
            await asyncio.sleep(GLANCE)
            if job.state is JobState.RUNNING and time.monotonic() - looked > PREVIEW_EVERY:
                job.preview_wanted, looked = True, time.monotonic()
            status, shown = self._status(job), job.preview
            if status != seen:
                seen = status
                look = same if shown is None else gr.update(value=_decoded(shown), visible=True)
                yield same, status, look, same, same, same, same
        job.fetched = True
        if job.state is not JobState.DONE:
            yield "", self._status(job), hidden, same, "", same, same
            return
        try:
            entry = await anyio.to_thread.run_sync(self._entry, job, pathlib.Path(str(picture)))
        except (InputError, OSError) as error:
            raise _told(error) from None
        history = [entry, *history][:REMEMBERED]
        gallery = [(each["small"], each["name"]) for each in history]
        yield "", self._status(job), hidden, (entry["before"], entry["after"]), entry["link"], history, gallery

    def stop(self, name: str) -> str:
        """Take the picture back."""
        job = self._service.queue.get(name) if name else None
        if job is None:
            return "Nothing is being restored."
        self._service.queue.cancel(job)
        return self._status(job)

    def again(self, history: list[dict[str, str]], number: int) -> tuple[Any, str, str]:
        """A result of before."""
        entry = history[number]
        if self._service.queue.get(entry["id"]) is None:
            return None, "", "This result has expired."
        return (entry["before"], entry["after"]), entry["link"], entry["made"]

    async def _accepted(self, picture: str | None, texts: dict[str, str]) -> Job:
        sent = self._sent(picture)
        with self._service.receiving() as path:
            shutil.copyfile(sent, path)
            return await anyio.to_thread.run_sync(self._service.accept, path, printable(sent.name), texts)

    def _sent(self, picture: str | None) -> pathlib.Path:
        """The file that was sent; no other of this machine."""
        if not picture:
            raise InputError("there is no picture yet: drop one, or choose a file")
        path = pathlib.Path(picture)
        if not path.resolve().is_relative_to(self._service.folder.resolve()) or not path.is_file():
            raise InputError("the picture is no longer here: send it again")
        return path

    def _status(self, job: Job) -> str:
        described = self._service.queue.described(job)
        match job.state:
            case JobState.WAITING:
                return f"Waiting, place {described['place']} in the queue"
            case JobState.RUNNING:
                return f"Step {job.step} of {job.steps}" if job.step else "Begun"
            case JobState.FAILED:
                return f"Failed: {html.escape(str(job.error))}"
            case JobState.DONE:
                return f"Done: {job.steps} steps, seed {job.options.seed}"
            case _:
                return str(job.state).capitalize()

    def _entry(self, job: Job, sent: pathlib.Path) -> dict[str, str]:
        """What the history keeps of a result: files of before and after as they are shown, which go when it goes."""
        after = images.load_image(job.target).rgb
        before = images.upscale(read_picture(sent, job.name).rgb, job.options.scale)
        sizes = {"before": (before, SHOWN_SIDE), "after": (after, SHOWN_SIDE), "small": (after, THUMBNAIL)}
        entry = {"id": job.id, "name": f"{job.name}, seed {job.options.seed}", "made": self._status(job)}
        for what, (picture, side) in sizes.items():
            path = job.target.with_name(f"{job.target.stem}_{what}.png")
            images.save_image(path, at_most(picture, side))
            job.shown.append(path)
            entry[what] = str(path)
        name = html.escape(f"{pathlib.Path(job.name).stem}_restored.png", quote=True)
        size = f"{after.shape[1]}x{after.shape[0]}"
        link = f'<a href="../v1/pictures/{job.id}/result" download="{name}">Download the PNG, {size}</a>'
        return {**entry, "link": link}


def _take_as_sent(picture: Any) -> None:
    """Let a component of pictures hand on the file that was sent: nothing decoded, and nothing fetched from elsewhere.

    Gradio would decode a picture of any size, and download one that is given by its address.
    """
    keep = picture.async_move_resource_to_block_cache

    async def keep_sent(place: str) -> str:
        if "://" in str(place):
            raise _told(InputError("the picture must be sent, not its address"))
        kept: str = await keep(place)
        return kept

    picture.async_move_resource_to_block_cache = keep_sent
    picture.preprocess = lambda sent: None if sent is None else sent.path


def _decoded(preview: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(preview), formats=("JPEG",)) as image:
        return np.asarray(image)


def _told(error: Exception) -> Exception:
    import gradio as gr

    told: Exception = gr.Error(html.escape(printable(str(error))), duration=20, print_exception=False)
    return told
