"""What `faithdiff restore` writes down of each result in the manifest, and what is left to do."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from faithdiff_jax.cli.exit_codes import BAD_INPUT
from faithdiff_jax.cli.jobs import Job
from faithdiff_jax.files.manifest import Manifest
from faithdiff_jax.inference.making import Making


def source_record(job: Job) -> dict[str, Any]:
    """What tells whether a source has changed."""
    try:
        status = os.stat(job.source)
        return {"source": _plain(str(job.source)), "bytes": status.st_size, "modified": status.st_mtime_ns}
    except OSError:
        return {"source": _plain(str(job.source)), "bytes": None, "modified": None}


def choose(
    jobs: Sequence[Job], kept: Manifest, making: Making, arguments: argparse.Namespace
) -> tuple[list[Job], list[str]]:
    """The jobs to do; and what was wrong before with those that would only fail again, one line each.

    What has a result is done, whoever made it: nothing is written over without --overwrite. A failure is final if it
    was the input's, and source, model and options are what they were.
    """
    if arguments.overwrite:
        return list(jobs), []
    todo, left_out, others, done = [], [], 0, 0
    for job in jobs:
        record = kept.get(job.target.name)
        if os.path.lexists(job.target):
            done += 1
            if record is None or record.get("error"):
                note_found(job, kept)
            elif not record.get("found") and not _made_alike(record, making, job):
                others += 1
        elif not arguments.retry_failed and record is not None and _fails_again(record, making, job):
            left_out.append(str(record["error"]))
        else:
            todo.append(job)
    if done:
        print(f"{done} of {len(jobs)} already done, skipped (--overwrite does them again)")
    if others:
        print(f"{others} of these were made with another model or other options")
    return todo, left_out


def note_found(job: Job, kept: Manifest) -> None:
    """Add a result that has no line: of another program, or written just before a crash.

    One that another process has in hand is that one's matter.
    """
    name = job.target.name
    if kept.claim(name):
        if not kept.done_elsewhere(name):
            kept.add(name, {**source_record(job), "seed": job.seed, "error": None, "found": True})
        kept.release(name)


def _fails_again(record: Mapping[str, Any], making: Making, job: Job) -> bool:
    source = source_record(job)
    return (
        isinstance(record.get("error"), str)
        and record.get("code") == BAD_INPUT
        and all(record.get(key) == value for key, value in source.items())
        and _made_alike(record, making, job)
    )


def _made_alike(record: Mapping[str, Any], making: Making, job: Job) -> bool:
    described = json.loads(json.dumps(making.described(job.seed)))
    keys = ("model", "loras", "dtype", "quantized", "frames", "options")
    return all(record.get(key) == described.get(key) for key in keys)


def _plain(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
