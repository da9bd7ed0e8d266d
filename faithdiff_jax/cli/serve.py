"""`faithdiff serve`: one loaded model behind an HTTP API and a page."""

import argparse
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, trace
from faithdiff_jax.cli.explain import explain
from faithdiff_jax.cli.option_flags import (
    add_model_flags,
    add_option_flags,
    given_options,
    load_model,
    lora_files,
    mesh_of,
)
from faithdiff_jax.cli.progress import log_above_the_bar
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.service.settings import ServiceOptions

if TYPE_CHECKING:
    from faithdiff_jax.service.service import Describe

DESCRIPTION = """Restore photographs for others: an HTTP API and a page in the browser, before one loaded model. Needs
pip install "faithdiff-jax[serve]", and for the page "faithdiff-jax[serve,page]"."""
TOKEN = "FAITHDIFF_TOKEN"
OWN = ("batch", "multiple")
"""Options of a restoration that the service chooses: they say how much it does at once, and how often it compiles."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add_model_flags(parser)
    parser.add_argument(
        "--captioner",
        metavar="DIR_OR_REPO",
        type=types.nonempty,
        help="have pictures described when asked to: any image-text-to-text model, kept in memory too",
    )
    parser.add_argument("--no-page", action="store_true", help="the API alone")
    add_option_flags(parser.add_argument_group("the service"), ServiceOptions)
    group = parser.add_argument_group(
        "options of a restoration", "Requests choose all others; the model directory has their defaults."
    )
    add_option_flags(group, RestoreOptions, OWN)
    return parser


def run(arguments: argparse.Namespace) -> int | None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
    given = given_options(arguments, ServiceOptions)
    if "token" not in given and os.environ.get(TOKEN):
        given["token"] = os.environ[TOKEN]
    settings, own = ServiceOptions(**given), given_options(arguments, RestoreOptions)
    RestoreOptions(**own)  # told before anything is read
    page = not arguments.no_page and importlib.util.find_spec("gradio") is not None
    _require_framework()

    from faithdiff_jax.inference.loading import default_options, preset_options
    from faithdiff_jax.inference.making import Making
    from faithdiff_jax.service.app import build_app
    from faithdiff_jax.service.guard import Guard
    from faithdiff_jax.service.server import bound, serve, url_of
    from faithdiff_jax.service.service import Service
    from faithdiff_jax.weights.model_directory import ModelDirectory

    stored = ModelDirectory.open(arguments.model or SMALL_MODEL)
    for options in (default_options(stored), *preset_options(stored).values()):
        options.replace(**own).check_against(stored.config)
    mesh, loras = mesh_of(arguments.mesh), lora_files(arguments, stored)
    with log_above_the_bar(), bound(settings) as made:
        describe = _captioner(arguments.captioner)
        model = load_model(stored, arguments, mesh, loras)
        making = Making(model.defaults, stored.digest, loras, arguments.dtype, arguments.quantized)
        service = Service(model, settings, making, _explained, own=own, describe=describe)
        with service.running():
            app = build_app(service)
            if page:
                from faithdiff_jax.service.page import mount

                app = mount(app, service)
            greeting = f"serving {stored.path} at {url_of(made)}{'' if page else 'docs'}"
            if not settings.loopback and settings.token is None:
                _say("anybody who reaches this address can use it: --token keeps others out")
            serve(Guard(app, settings), service, made, greeting, _say)
    _say("stopped")
    return None


def _say(line: str) -> None:
    print(line, flush=True)


def _explained(error: BaseException) -> tuple[int, str]:
    trace(error)
    return explain(error)


def _require_framework() -> None:
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("serving needs FastAPI: pip install 'faithdiff-jax[serve]'") from None


def _captioner(name: str | None) -> "Describe | None":
    """What describes pictures; loaded first, because its faults are told sooner."""
    if name is None:
        return None
    from faithdiff_jax.cli.caption import prepare_library
    from faithdiff_jax.data.captioning import Captioner

    prepare_library()
    loaded: Any = Captioner.load(name)
    describe: Describe = loaded
    return describe
