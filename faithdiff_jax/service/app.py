"""The HTTP API: send a picture, look at how far it is, fetch the result, take it back."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio.to_thread
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from faithdiff_jax import __version__
from faithdiff_jax.errors import InputError, RunError, shown
from faithdiff_jax.files.captions import OF_TILES
from faithdiff_jax.files.reading import printable
from faithdiff_jax.service.forms import form_schema
from faithdiff_jax.service.jobs import Job, JobState
from faithdiff_jax.service.queue import Busy
from faithdiff_jax.service.reference import reference_page
from faithdiff_jax.service.service import Service
from faithdiff_jax.service.settings import PATIENCE
from faithdiff_jax.service.uploads import Form, NotAForm

LONGEST_WAIT = 60.0
"""Seconds for which a request may wait for something to happen."""
LOOKED_AT = 2
"""Pictures that are decoded at the same time to see that they can be."""
GLANCE = 0.02
"""Seconds between two looks at a job that somebody waits for."""

Wait = Annotated[float, Query(ge=0, le=LONGEST_WAIT, description="seconds to wait for the end")]


class TooSlow(InputError):
    """A sender who holds a place in the queue for longer than the picture warrants."""


class Unknown(InputError):
    """No such job."""


class NotYet(InputError):
    """A job that is in no state for what is asked of it."""


def build_app(service: Service) -> FastAPI:
    """The API of a service; `Guard` goes around it."""
    app = FastAPI(
        title="FaithDiff",
        version=__version__,
        description="Restores photographs: send one, wait, fetch the result.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    _answer_errors(app, service)
    _add_pictures(app, service)
    _add_information(app, service)
    return app


def _add_pictures(app: FastAPI, service: Service) -> None:
    queue = service.queue
    looking = anyio.CapacityLimiter(LOOKED_AT)
    schema = form_schema(service.defaults, service.presets, service.limits())
    form: dict[str, Any] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
    refused = {
        400: {"description": "not a form with a picture"},
        408: {"description": "sent too slowly"},
        413: {"description": "too many bytes"},
        422: {"description": "a picture, an option or a value that cannot be used"},
        503: {"description": "the queue is full, or the service is about to stop; Retry-After has the seconds"},
    }
    unknown = {404: {"description": "no such picture, or it has expired"}}

    def found(name: str) -> Job:
        job = queue.get(name)
        if job is None:
            raise Unknown(f"{shown(name)}: no such picture, or its result has expired")
        return job

    def status_of(job: Job) -> dict[str, Any]:
        if job.final and job.state is not JobState.DONE:
            job.fetched = True
        return queue.described(job)

    async def ended(job: Job, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not job.final and time.monotonic() < end:
            await asyncio.sleep(GLANCE)

    @app.post("/v1/pictures", status_code=202, openapi_extra=form, responses=refused, summary="Send a picture")  # type: ignore[arg-type]
    async def send(request: Request, response: Response) -> dict[str, Any]:
        """Put a picture into the queue; the answer has the id by which it is asked for."""
        with service.receiving() as path:
            form = await _read_form(request, path, service.settings.min_rate)
            job = await anyio.to_thread.run_sync(service.accept, path, form.name, form.fields, limiter=looking)
        response.headers["Location"] = f"/v1/pictures/{job.id}"
        return status_of(job)

    @app.get("/v1/pictures/{id}", responses=unknown, summary="How far it is")  # type: ignore[arg-type]
    async def status(id: str, wait: Wait = 0) -> dict[str, Any]:
        """JobState, place in the queue, and the steps done."""
        job = found(id)
        await ended(job, wait)
        return status_of(job)

    @app.get("/v1/pictures/{id}/preview", response_class=Response, responses=unknown, summary="What it looks like now")  # type: ignore[arg-type]
    async def preview(id: str) -> Response:
        """A JPEG of the picture after the next step, or of the last preview that there is; X-Step says of which."""
        job = found(id)
        job.preview_wanted, end = True, time.monotonic() + LONGEST_WAIT
        while not job.final and job.preview_wanted and time.monotonic() < end:
            await asyncio.sleep(GLANCE)
        image, step = job.preview, job.preview_step
        if image is None:
            raise NotYet(f"{job.id}: is {job.state}, there is a preview of a picture that is running")
        return Response(image, media_type="image/jpeg", headers={"X-Step": str(step), "Cache-Control": "no-store"})

    done = {**unknown, 409: {"description": "it is not done (yet)"}}

    @app.get("/v1/pictures/{id}/result", response_class=FileResponse, responses=done, summary="The restored picture")  # type: ignore[arg-type]
    async def result(id: str, wait: Wait = 0) -> Response:
        """A PNG, as `faithdiff restore` writes it."""
        job = found(id)
        await ended(job, wait)
        if job.state is not JobState.DONE:
            if job.state is JobState.FAILED:
                job.fetched = True
                return _said(422 if job.code == 2 else 500, str(job.error))
            raise NotYet(f"{job.id}: is {job.state}, there is a result of a picture that is done")
        job.fetched = True
        return FileResponse(job.target, media_type="image/png", headers={"Cache-Control": "no-store"})

    @app.delete("/v1/pictures/{id}", responses=unknown, summary="Take it back")  # type: ignore[arg-type]
    async def cancel(id: str) -> dict[str, Any]:
        """End it if it waits, stop it at its next step if it is running, remove its result if it is done."""
        job = found(id)
        queue.cancel(job)
        return status_of(job)

    if service.captions:

        @app.post("/v1/captions", openapi_extra=form, responses=refused, summary="Describe a picture")  # type: ignore[arg-type]
        async def caption(request: Request) -> dict[str, str]:
            """What a picture shows, to be sent as its caption."""
            with service.file_for_now() as path:
                form = await _read_form(request, path, service.settings.min_rate)
                return {"caption": await anyio.to_thread.run_sync(service.caption, path, form.name)}

        @app.post("/v1/tile_captions", openapi_extra=form, responses=refused, summary="Describe each tile")  # type: ignore[arg-type]
        async def tile_captions(request: Request) -> dict[str, list[str]]:
            """What each tile shows of a picture with the options that come with it; to be sent as tile_captions."""
            with service.file_for_now() as path:
                form = await _read_form(request, path, service.settings.min_rate)
                found = await anyio.to_thread.run_sync(service.tile_captions, path, form.name, form.fields)
                return {OF_TILES: found}


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", summary="The model and what it takes")
    async def model() -> dict[str, Any]:
        """Default options, presets and limits."""
        return service.described()

    @app.get("/v1/health", summary="Whether pictures are taken on")
    async def health() -> dict[str, Any]:
        """And how many wait, are running and are kept."""
        return {"open": service.queue.open, **service.queue.counts()}

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def reference() -> str:
        return reference_page(app.openapi())


async def _read_form(request: Request, path: Any, least: int) -> Form:
    form = Form(path, request.headers.get("content-type", ""))
    try:
        await form.read(_steady(request.stream(), least))
    except ClientDisconnect:
        raise NotAForm("the connection ended before the whole request was sent") from None
    return form


async def _steady(stream: AsyncIterator[bytes], least: int) -> AsyncIterator[bytes]:
    """What is sent, as long as it comes by so many bytes a second on average; TooSlow from there on."""
    begin, received, chunks = time.monotonic(), 0, aiter(stream)
    while True:
        try:
            async with asyncio.timeout(begin + PATIENCE + received / least - time.monotonic()):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            seconds = time.monotonic() - begin
            line = f"sent too slowly, {received:,} bytes in {seconds:.0f} s; at least {least:,} a second are waited for"
            raise TooSlow(line) from None
        received += len(chunk)
        yield chunk


def _answer_errors(app: FastAPI, service: Service) -> None:
    """Each error as one status and one line."""
    codes: dict[type[Exception], int] = {NotAForm: 400, Unknown: 404, NotYet: 409, InputError: 422, Busy: 503}

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, Busy):
            return _said(503, str(error), {"Retry-After": str(error.retry_after)})
        if isinstance(error, TooSlow):
            return _said(408, str(error), {"Connection": "close"})
        code = next((codes[kind] for kind in type(error).__mro__ if kind in codes), 500)
        return _said(code, service.explain(error)[1])

    for kind in (InputError, RunError, Exception):
        app.add_exception_handler(kind, answer)

    from fastapi.exceptions import RequestValidationError

    async def answer_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _said(422, f"{first['loc'][-1]} is {shown(first.get('input'))}: {first['msg']}")

    app.add_exception_handler(RequestValidationError, answer_validation)


def _said(status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": printable(line)}, status, headers)
