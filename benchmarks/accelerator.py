"""Everything to measure on an accelerator, in one command: parity, restoring, training and memory beside PyTorch.

    python benchmarks/accelerator.py --minutes 10 --output FOLDER
    python benchmarks/accelerator.py --minutes 10 --output FOLDER --part restore
    python benchmarks/accelerator.py --minutes 10 --output FOLDER --size tiny --device cpu   # to try the command

Needs this repository and what it depends on: jax with its accelerator's plugin, flax, optax, orbax-checkpoint, grain,
jaxtyping, transformers, opencv-python-headless, scipy, pillow, pyyaml, tqdm, safetensors, tensorboardX; for what is
beside PyTorch, torch with CUDA and diffusers. No weights: parameters are random, those of the parity part equal in
both.

Each figure is written to FOLDER/figures.jsonl the moment it is there, and FOLDER/report.md is written anew. Every part
of every framework is a process of its own: one that fails, hangs or runs out of memory costs its own figures alone. A
part that another figure needs goes first; time that one leaves is the others'.

    rate      the largest bfloat16 matrix product's TFLOP/s: what utilisation is a fraction of
    parity    largest relative error of an evaluation and of two steps, against PyTorch in float32
    restore   seconds a picture of 1024x1024 in 20 steps with guidance, alone and in batches; peak memory; the kernels
              that take longest; diffusers eager with plain attention, with SDPA, in channels_last, and compiled
    train     a step of stage 2 at 512x512, beside PyTorch's compiled one
    memory    what the compiler assigns to the denoiser for pictures of 1024 to 4096
"""

import argparse
import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from paired import SIZES

# In the order of what one would miss most; each with its part of the time.
TASKS = (
    ("rate", "ours", 1),
    ("parity", "torch", 3),
    ("parity", "ours", 4),
    ("restore", "ours", 6),
    ("restore", "torch", 6),
    ("train", "ours", 6),
    ("train", "torch", 6),
    ("memory", "ours", 3),
)
PARTS = tuple(dict.fromkeys(part for part, _, _ in TASKS))

Emit = Callable[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for figures.jsonl and report.md")
    parser.add_argument("--minutes", type=float, default=10.0, help="that it may take in all")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--size", choices=SIZES, default="sdxl")
    parser.add_argument("--device", choices=("cuda", "tpu", "cpu"), default="cuda", help="without PyTorch on tpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes {options.minutes}: must be above 0 and at most 1440")
    if options.child:
        child(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output)
    end = time.monotonic() + 60 * options.minutes
    tasks = [task for task in TASKS if options.part in ("all", task[0])]
    tasks = [task for task in tasks if options.device != "tpu" or task[1] == "ours"]
    while tasks:
        part, who, weight = tasks[0]
        share = weight / sum(weight for _, _, weight in tasks)
        run_task(part, who, options, report, seconds=share * (end - time.monotonic()))
        tasks = tasks[1:]
    print(report.path.read_text(encoding="utf-8"))
    raise SystemExit(1 if report.failed else 0)


class Report:
    """What was measured so far, in two files.

    Attributes:
        path: the table for people.
        failed: whether any part did not end well.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "report.md"
        self._lines = folder / "figures.jsonl"
        self._lines.write_text("", encoding="utf-8")
        self._figures: list[dict[str, Any]] = []

    def add(self, figure: dict[str, Any]) -> None:
        """Write one figure: part, who, what and value, or part, who and failed."""
        self._figures.append(figure)
        with self._lines.open("a", encoding="utf-8") as file:
            print(json.dumps(figure), file=file, flush=True)
            os.fsync(file.fileno())
        self.path.write_text(self._text(), encoding="utf-8")

    @property
    def failed(self) -> bool:
        return any("failed" in figure for figure in self._figures)

    def _text(self) -> str:
        lines = []
        for part in dict.fromkeys(figure["part"] for figure in self._figures):
            lines += [f"## {part}", "", "| | | |", "|---|---|---|"]
            for figure in self._figures:
                if figure["part"] == part:
                    what, value = (figure.get("what", "failed"), figure.get("value", figure.get("failed")))
                    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                    lines.append(f"| {figure['who']} | {what} | {shown} |")
            lines.append("")
        return "\n".join(lines)


def run_task(part: str, who: str, options: argparse.Namespace, report: Report, *, seconds: float) -> None:
    """Run one part of one framework in a process of its own, for so long at most."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", f"{part}/{who}"]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {})
    print(f"{part}, {who}: at most {seconds:.0f} s", flush=True)
    log = options.output / f"{part}-{who}.log"
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in lines_until(process.stdout, time.monotonic() + seconds):
            if line is None:  # its time is over; what it has written is kept
                os.killpg(process.pid, signal.SIGKILL)
                report.add({"part": part, "who": who, "failed": f"stopped after its {seconds:.0f} s"})
                return
            with contextlib.suppress(ValueError):  # what libraries print
                figure = json.loads(line)
                if isinstance(figure, dict) and "part" in figure:
                    print(f"  {figure}", flush=True)
                    report.add(figure)
        if process.wait():
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            report.add({"part": part, "who": who, "failed": f"exit code {process.returncode}: {''.join(last)}"})


def lines_until(stream: TextIO, end: float) -> Iterator[str | None]:
    """Lines as they come; None, and no more, if the stream is still open at `end`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield line


def child(options: argparse.Namespace) -> None:
    """Measure one part of one framework, a JSON line for each figure."""
    part, who = options.child.split("/")

    def emit(what: str, value: object, label: str = who) -> None:
        print(json.dumps({"part": part, "who": label, "what": what, "value": value}), flush=True)

    if who == "ours":
        import accelerator_ours as measurements
    else:
        import accelerator_torch as measurements  # type: ignore[no-redef]
    getattr(measurements, part)(options, emit)


if __name__ == "__main__":
    main()
