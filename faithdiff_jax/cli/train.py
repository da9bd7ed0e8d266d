"""`train.py` and `faithdiff-train`: train FaithDiff, or go on with a run."""

import argparse
import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from faithdiff_jax.cli.command import INTERRUPTED, Parser, run

DESCRIPTION = """Train FaithDiff as a configuration says, from a model directory, into a run directory that the same
command goes on with when it is stopped."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 2 for bad input, 1 for a run that cannot go on, 130 when told to stop."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    several = (arguments.coordinator, arguments.processes, arguments.process_id)
    if any(value is not None for value in several) and None in several:
        parser.error("--coordinator, --processes and --process-id go together")
    return run(lambda: _train(arguments))


def _parser() -> Parser:
    parser = Parser(DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="YAML", help="what to train: see configs/")
    parser.add_argument("--model", required=True, metavar="MODEL_DIR", help="the model directory to start from")
    parser.add_argument("--output", required=True, metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "--data", metavar="FOLDER", help="a folder of photographs, instead of the configuration's data.sources"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto begins a run or goes on with it; never and must refuse the other case",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where the first one listens")
    parser.add_argument("--processes", type=int, metavar="N", help="of several processes: how many")
    parser.add_argument("--process-id", type=int, metavar="I", help="of several processes: this one's number, from 0")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="several processes whose cluster (TPU pod, Slurm, Open MPI) says who is who",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as batch=64 mesh.fsdp=8")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from faithdiff_jax.training.config import load_train_config

    data = [f"data.sources=[{{photos: {_quoted(arguments.data)}}}]"] if arguments.data else []
    config = load_train_config(arguments.config, [*data, *arguments.overrides])

    import jax

    from faithdiff_jax.training.loop import train

    _start_processes(jax, arguments)
    is_main = jax.process_index() == 0
    with _log_above_the_bar(logging.INFO if is_main else logging.WARNING):
        done = train(config, pathlib.Path(arguments.model), pathlib.Path(arguments.output), resume=arguments.resume)
    if done < config.steps:
        if is_main:
            print(f"stopped after step {done} of {config.steps}; the same command goes on from there")
        return INTERRUPTED
    if is_main:
        print(
            f"{done} steps done; convert_weights.py --run {arguments.output} --output MODEL_DIR makes a model of them"
        )
    return 0


@contextlib.contextmanager
def _log_above_the_bar(level: int) -> Iterator[None]:
    """Show on stdout what the package logs, above the progress bar."""
    log = logging.getLogger("faithdiff_jax")
    before = log.handlers, log.propagate, log.level
    log.handlers, log.propagate = [_BarHandler()], False
    log.setLevel(level)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


class _BarHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def _start_processes(jax: Any, arguments: argparse.Namespace) -> None:
    if arguments.coordinator is not None:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process_id)
    elif arguments.distributed:
        jax.distributed.initialize()


def _quoted(text: str) -> str:
    """A string as YAML takes it, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"
