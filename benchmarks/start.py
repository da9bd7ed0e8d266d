"""What a process spends before its first picture is there: with nothing kept, with JAX's cache, with executables.

    python benchmarks/start.py [--model DIR] [--size 512x512] [--rounds 3]

Each run is a process of its own that imports, reads the model and restores one picture; what it spends on the picture a
second time is taken off, so that what is left is the start. They take turns; CPU seconds are of all threads, and tell
more than seconds where other programs run.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

KINDS = ("nothing kept", "JAX's cache", "executables")


def spent() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def child(options: argparse.Namespace) -> None:
    """One process; prints seconds and CPU seconds of the start."""
    begin = spent()
    import jax
    import numpy as np

    from faithdiff_jax import SMALL_MODEL
    from faithdiff_jax.cli.option_flags import use_cache
    from faithdiff_jax.inference import executables
    from faithdiff_jax.inference.pipeline import FaithDiff

    if options.child != KINDS[0]:
        use_cache(str(options.cache))
    if options.child == KINDS[1]:
        executables.keep_in(None)
    model = FaithDiff.load(options.model or SMALL_MODEL)
    width, height = map(int, options.size.split("x"))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    first = model.restore(picture, "a photograph", scale=1)
    after = spent()
    again = model.restore(picture, "a photograph", scale=1)
    twice = spent()
    assert np.array_equal(first, again)
    start = [b - a - (c - b) for a, b, c in zip(begin, after, twice, strict=True)]
    print(json.dumps({"seconds": start[0], "cpu": start[1], "backend": jax.default_backend()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="model directory; else the small one")
    parser.add_argument("--size", default="512x512", help="of the picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(options.rounds + 1):
            for kind in KINDS:
                if number == 0 and kind == KINDS[0]:
                    continue  # the first round fills the caches
                place = pathlib.Path(cache) / str(KINDS.index(kind))
                command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--cache", str(place)]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
                if number:
                    found[kind].append(json.loads(output.splitlines()[-1]))
        sizes = {
            kind: sum(path.stat().st_size for path in pathlib.Path(cache, str(number)).rglob("*") if path.is_file())
            for number, kind in enumerate(KINDS)
        }
    print(f"a picture of {options.size}, medians of {options.rounds}, {found[KINDS[0]][0]['backend']}")
    print(f"{'':16}{'seconds':>10}{'CPU seconds':>14}{'kept, MB':>10}")
    for kind, reports in found.items():
        seconds, cpu = (statistics.median(report[name] for report in reports) for name in ("seconds", "cpu"))
        print(f"{kind:16}{seconds:10.1f}{cpu:14.1f}{sizes[kind] / 1e6:10.1f}")


if __name__ == "__main__":
    main()
