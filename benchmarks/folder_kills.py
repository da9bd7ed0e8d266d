"""Kills in a folder: `faithdiff restore` with the small model, killed at random moments and started again.

    python benchmarks/folder_kills.py                  # 10 kills, 40 pictures, one process
    python benchmarks/folder_kills.py --processes 2    # the same folder shared by two, one of which is killed

A process is killed (SIGKILL) while it loads, restores or writes; another takes its place at once. In the end every
result must be that of a run which nothing disturbed, byte for byte; none may have been written a second time; and the
manifest must have one line for each.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from folder import write_pictures

from faithdiff_jax.files.manifest import NAME

SIZES, LEAST, MOST = 1, 32, 48  # how many sizes there are, and pixels a side


def begin(place: pathlib.Path, output: pathlib.Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "faithdiff_jax", "restore", "--input", place / "in", "--output", output]
    command += ["--cache", place / "cache", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def results(output: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Name -> what changes when a result is written again."""
    found = {path.name: path.stat() for path in output.glob("*.png")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def lines(output: pathlib.Path) -> list[str]:
    manifest = output / NAME
    return manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []


def wait_for(process: subprocess.Popen, output: pathlib.Path, count: int) -> None:
    """Wait until the manifest has so many lines."""
    while len(lines(output)) < count:
        if process.poll() is not None:
            raise SystemExit(f"ended by itself with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.01)


def killed_again_and_again(place: pathlib.Path, kills: int, count: int, rng: random.Random) -> tuple[int, int]:
    """Of the last run the exit code; how many of the kills came before a process had finished a picture."""
    output, flags = place / "killed", ["--shared"] if count > 1 else []
    processes = [begin(place, output, *flags) for _ in range(count)]
    early, seen = 0, results(output)
    for _ in range(kills):
        number, before = rng.randrange(count), len(lines(output))
        wanted = rng.randrange(6)
        if wanted:
            wait_for(processes[number], output, before + wanted)
        time.sleep(rng.uniform(0, 0.5 if wanted else 5))
        processes[number].kill()
        processes[number].communicate()
        early += len(lines(output)) == before
        now = results(output)
        assert all(now[name] == status for name, status in seen.items()), "a result was written again"
        seen = now
        processes[number] = begin(place, output, *flags)
    codes = []
    for process in processes:
        process.communicate()
        codes.append(process.returncode)
    assert all(results(output)[name] == status for name, status in seen.items()), "a result was written again"
    return max(codes, key=abs), early


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "in").mkdir()
        write_pictures(place / "in", given.pictures, SIZES, LEAST, MOST)
        whole = begin(place, place / "whole")
        _, said = whole.communicate()
        assert whole.returncode == 0, said
        rng = random.Random(given.seed)
        code, early = killed_again_and_again(place, given.kills, given.processes, rng)
        assert code == 0, f"the last run ended with {code}"
        records = [json.loads(line) for line in lines(place / "killed")]
        made = sorted(record["result"] for record in records)
        assert made == sorted(path.name for path in (place / "whole").glob("*.png")), made
        assert not any(record["error"] for record in records)
        for name in made:
            assert (place / "killed" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
        found = sum(record.get("found", False) for record in records)
        print(
            f"{given.processes} processes, {given.kills} kills, {early} of them before a picture was done: "
            f"{len(made)} results, byte for byte, none written twice, one line each, {found} of them added by the next "
            f"process; {len(list((place / 'killed').glob('.*.tmp')))} unfinished files are left"
        )


if __name__ == "__main__":
    main()
