"""`faithdiff train`: train FaithDiff, or resume a run."""

import argparse
import json
import logging
import os
from typing import Any

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report
from faithdiff_jax.cli.exit_codes import DONE, INTERRUPTED
from faithdiff_jax.cli.explain import printable
from faithdiff_jax.cli.progress import log_above_the_bar
from faithdiff_jax.errors import InputError

DESCRIPTION = """Train FaithDiff as a configuration says, starting from a model directory. The run is kept in a
directory of its own: when it is stopped, the same command resumes it where it was."""

HEARTBEAT_SECONDS = 45
"""Of several processes, one that was not heard of for so long is gone, and the others end: JAX's own 100 s are dear."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="NAME_OR_YAML",
        help="what to train: the name of a configuration that comes with the package, such as stage2, "
        "ablations/encoder_fixed or tiny/stage2, or a YAML file",
    )
    add("--model", type=types.place, required=True, metavar="MODEL_DIR", help="the model directory to start from")
    add("--output", type=types.place, required=True, metavar="RUN_DIR", help="the directory of the run")
    add(
        "--data",
        type=types.nonempty,  # as it was written, as a resumed run compares it
        metavar="DIR",
        help="a folder of photographs, in place of the configuration's data.sources",
    )
    add(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="auto starts a run, or resumes the one in --output; never only starts one, must only resumes one",
    )
    add(
        "--dry-run",
        action="store_true",
        help="do everything but the steps: read the parameters, load a batch, compile the step; nothing is written",
    )
    add(
        "--profile",
        type=types.output_folder,
        metavar="DIR",
        help="folder for a profile of the second to the fifth step, which TensorBoard and xprof show",
    )
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--coordinator", type=types.address, metavar="HOST:PORT", help="where the first of the processes listens"
    )
    several.add_argument("--processes", type=types.whole(1, 2**20), metavar="N", help="how many processes there are")
    several.add_argument(
        "--process-id", type=types.whole(0, 2**20), metavar="I", help="the number of this process, from 0"
    )
    several.add_argument(
        "--distributed",
        action="store_true",
        help="ask the cluster (a TPU pod, Slurm or Open MPI) for the three above",
    )
    add("overrides", nargs="*", metavar="key=value", help="changes to the configuration, such as batch=64 mesh.fsdp=8")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Train to the last step or until the process is told to stop."""
    _check_processes(arguments)

    from faithdiff_jax.training.config import load_train_config

    data = [f"data.sources=[{{photos: {_quoted(arguments.data)}}}]"] if arguments.data is not None else []
    config = load_train_config(arguments.config, [*data, *arguments.overrides])

    import jax

    from faithdiff_jax.training.loop import train

    _start_processes(jax, arguments)
    is_main = jax.process_index() == 0
    if arguments.dry_run:
        from faithdiff_jax.training.rehearsal import rehearse

        with log_above_the_bar(logging.INFO if is_main else logging.WARNING):
            for line in rehearse(config, arguments.model):
                if is_main:
                    print(line, flush=True)
        return DONE
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    with log_above_the_bar(logging.INFO if is_main else logging.WARNING):
        try:
            done = train(config, arguments.model, arguments.output, resume=arguments.resume, profile=arguments.profile)
        except Exception as error:
            if jax.process_count() > 1:
                # At its usual end this process would wait for the others, and they for it: they miss its heartbeat.
                os._exit(report(error))
            raise
    if done < config.steps:
        if is_main:
            print(f"stopped after step {done} of {config.steps}; the same command resumes the run from there")
        return INTERRUPTED
    if is_main:
        print(f"{done} steps done; `faithdiff convert --run {arguments.output} --output MODEL_DIR` exports the model")
    return DONE


def _check_processes(arguments: argparse.Namespace) -> None:
    several = (arguments.coordinator, arguments.processes, arguments.process_id)
    if all(value is None for value in several):
        return
    if None in several:
        raise InputError("--coordinator, --processes and --process-id go together")
    if arguments.distributed:
        raise InputError(
            "--distributed: asks the cluster for --coordinator, --processes and --process-id, leave them out"
        )
    types.check_process_id(arguments.process_id, arguments.processes)


def _start_processes(jax: Any, arguments: argparse.Namespace) -> None:
    if arguments.coordinator is not None:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.processes,
            arguments.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif arguments.distributed:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except (ValueError, KeyError) as error:  # JAX looks for a cluster in the environment
            raise InputError(
                "--distributed: no cluster found here (a TPU pod, Slurm or Open MPI); give --coordinator, --processes "
                "and --process-id"
            ) from error


def _quoted(text: str) -> str:
    """A string as YAML takes it, whatever is in it: YAML reads JSON's strings."""
    return printable(json.dumps(text, ensure_ascii=False))
