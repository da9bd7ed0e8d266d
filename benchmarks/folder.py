"""A folder of pictures of many sizes: pictures a minute, compiled programs and memory, setting by setting.

    python benchmarks/folder.py
    python benchmarks/folder.py --pictures 60 --sizes 40 --least 64 --most 160 --rounds 2 --settings "" "--multiple 256"
    python benchmarks/folder.py --settings "" "--multiple 64" --one-by-one

Every setting is `faithdiff restore` with these flags on the same folder, in a process of its own that finds nothing
compiled. With --one-by-one, every setting is also a command for each picture, one after another, which find what the
ones before have compiled. A round takes all settings in turn; times are medians over rounds. Pictures are cut out of
the example photographs. CPU time is of the whole process, and says more than time on a machine that does something else
too.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from PIL import Image

ORIGINALS = pathlib.Path(__file__).parent.parent / "examples" / "originals"
SETTINGS = ("", "--multiple 64", "--multiple 256")
COMPILED = "/jax/core/compile/backend_compile_duration"
PARTS = 6  # of a run, of which each has its largest use of memory


def write_pictures(folder: pathlib.Path, pictures: int, sizes: int, least: int, most: int) -> None:
    """PNG files of that many sizes, sides from `least` to `most` pixels; the first sizes come a second time."""
    rng = np.random.default_rng(0)
    sides = rng.integers(least, most + 1, (sizes, 2))
    sources = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(ORIGINALS.glob("*.png"))]
    for number in range(pictures):
        source, (height, width) = sources[number % len(sources)], sides[number % sizes]
        top, left = (
            int(rng.integers(0, max(1, have - want))) for have, want in zip(source.shape, (height, width), strict=False)
        )
        Image.fromarray(source[top : top + height, left : left + width]).save(folder / f"{number:03d}.png")


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory(threading.Thread):
    """Looks at how much memory the process holds, again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[int] = []

    def run(self) -> None:
        while True:
            self.seen.append(resident())
            time.sleep(0.1)


def restore(flags: list[str]) -> None:
    """What the child does: one run of the command, and a line of JSON about it."""
    import jax

    from faithdiff_jax.cli.main import run_command

    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name == COMPILED else None
    )
    memory = Memory()
    memory.start()
    code = run_command("restore", flags)
    times = os.times()
    marks = [max(part, default=0) for part in np.array_split(memory.seen, PARTS)]
    found = {
        "code": code,
        "cpu": times.user + times.system,
        "programs": len(compiled),
        "compiling": sum(compiled),
        "memory": list(map(int, marks)),
    }
    print(json.dumps(found))


def measured(flags: str, folder: pathlib.Path, cache: str = "") -> dict:
    """One setting, once: of a folder, or of one picture."""
    with tempfile.TemporaryDirectory() as output:
        given = [*shlex.split(flags), "--input", str(folder), "--output", output, "--cache", cache]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        child = [sys.executable, __file__, "--child", json.dumps(given)]
        begin = time.perf_counter()
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        if found["code"]:
            raise SystemExit(f"restore {flags}: ended with {found['code']}")
    return found | {"seconds": time.perf_counter() - begin}


def measured_one_by_one(flags: str, folder: pathlib.Path) -> dict:
    """The same for a command for each picture; memory is that of the largest process of each part of the run."""
    with tempfile.TemporaryDirectory() as cache:
        each = [measured(flags, path, cache) for path in sorted(folder.iterdir())]
    sums = {name: sum(one[name] for one in each) for name in ("seconds", "cpu", "programs", "compiling")}
    peaks = np.array_split([max(one["memory"]) for one in each], PARTS)
    return sums | {"memory": [int(max(part, default=0)) for part in peaks]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--sizes", type=int, default=40)
    parser.add_argument("--least", type=int, default=64, help="shortest side of a picture, pixels")
    parser.add_argument("--most", type=int, default=160, help="longest side of a picture, pixels")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="FLAGS")
    parser.add_argument("--one-by-one", action="store_true", help="each setting also as a command for each picture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        restore(json.loads(given.child))
        return
    ways = {"in one process": measured} | ({"one by one": measured_one_by_one} if given.one_by_one else {})
    found: dict[tuple[str, str], list[dict]] = {(flags, way): [] for flags in given.settings for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(pathlib.Path(folder), given.pictures, given.sizes, given.least, given.most)
        for number in range(given.rounds):
            for (flags, way), rounds in found.items():
                rounds.append(ways[way](flags, pathlib.Path(folder)))
                print(f"round {number + 1}, {flags or 'defaults'}, {way}: {rounds[-1]}", file=sys.stderr, flush=True)
    print(f"\n{given.pictures} pictures of {given.sizes} sizes, {given.least} to {given.most} pixels a side\n")
    print(f"| flags | | pictures a minute | a CPU minute | programs | s compiling | most MB in each 1/{PARTS} of it |")
    print("|---|---|---|---|---|---|---|")
    for (flags, way), rounds in found.items():
        middle = {name: statistics.median(one[name] for one in rounds) for name in ("seconds", "cpu", "compiling")}
        memory = ", ".join(f"{max(one['memory'][part] for one in rounds) / 1e6:.0f}" for part in range(PARTS))
        rates = " | ".join(f"{60 * given.pictures / middle[name]:.1f}" for name in ("seconds", "cpu"))
        programs = max(one["programs"] for one in rounds)
        print(f"| `{flags or 'defaults'}` | {way} | {rates} | {programs} | {middle['compiling']:.0f} | {memory} |")


if __name__ == "__main__":
    main()
