"""Kills in training: runs of a tiny model over 1, 2 and 4 CPU processes, killed, resumed and compared bit for bit.

    python benchmarks/kills.py              # 20 kills
    python benchmarks/kills.py --kills 3 --processes 2

Of a run's processes a random one is killed (SIGKILL) at a random moment, the others must end by themselves, and the
same command resumes the run; when all kills are done it goes to its end. Its last checkpoint must be, to the last bit,
that of a run over as many processes which nothing disturbed.
"""

import argparse
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from training_runs import STAGE_1, assert_same_bits, finish, losses, place, saved, start_process

DEVICES = 4  # of all processes together
STEPS, SECONDS = 40, 0.5
CHANGES = STAGE_1 | {
    "steps": STEPS,
    "batch": DEVICES,
    "checkpoint": {"every": 3, "latest": 2},
    "mesh": {"data": 2, "fsdp": 2},
}


def begin(run: Path, count: int, seconds: float) -> list:
    """The processes of a run, or of its continuation."""
    arguments = place().command(run, CHANGES)
    options = {"devices": DEVICES // count, "use": DEVICES, "cache": run.parent / "programs", "seconds": seconds}
    if count == 1:
        return [start_process(arguments, **options)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = ["--coordinator", address, "--processes", count, "--process-id"]
    return [start_process([*arguments, *several, i], **options) for i in range(count)]


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text(encoding="utf-8").count('"loss"') if log.exists() else 0


def kill_one(run: Path, processes: list, rng: random.Random) -> float:
    """Seconds that the others took to end, once the run had got on and one process was killed."""
    before = lines(run)
    while lines(run) <= before + 1:
        if any(process.poll() is not None for process in processes):
            raise SystemExit(f"ended by itself: {[finish(process) for process in processes]}")
        before = min(before, lines(run))  # what is there at first may be of steps that are dropped
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 2))
    rng.choice(processes).kill()
    killed = time.monotonic()
    codes = [finish(process, 120)[0] for process in processes]
    if 0 in codes or -signal.SIGKILL not in codes:
        raise SystemExit(f"exit codes {codes}")
    return time.monotonic() - killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20, help="of all runs together")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, count in enumerate(flags.processes):
            kills = len(range(number, flags.kills, len(flags.processes)))
            whole, run = Path(folder) / f"whole{count}", Path(folder) / f"run{count}"
            ends = [finish(process) for process in begin(whole, count, 0)]
            assert all(code == 0 for code, _, _ in ends), ends
            waits = [kill_one(run, begin(run, count, SECONDS), rng) for _ in range(kills)]
            ends = [finish(process) for process in begin(run, count, 0)]
            assert all(code == 0 for code, _, _ in ends), ends
            assert_same_bits(saved(run), saved(whole))
            assert losses(run) == losses(whole)
            print(
                f"{count} processes: {kills} kills, the last checkpoint and every loss bit for bit; the others ended "
                f"within {max(waits):.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
