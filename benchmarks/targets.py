"""The table of `configs/targets`: what stage 2 (or LoRA) takes of each target, by `faithdiff plan`.

    python benchmarks/targets.py                    # all rows, minutes each, one at a time
    python benchmarks/targets.py v5e_16 v6e_8       # some of them
    python benchmarks/targets.py v5e_16 accumulation=8 rematerialisation=dots    # with changes

Each row is printed when it is known, as docs/planning.md has it.
"""

import argparse
import json
import subprocess
import sys

# Where each configuration is planned for; `faithdiff plan --config targets/NAME` takes the same.
TARGETS = {
    "gpu_24gb": ("--gpu", "rtx4090:1"),
    "gpu_80gb": ("--gpu", "h100:1"),
    "gpu_8x80gb": ("--gpu", "h100:8"),
    "v5e_16": ("--topology", "v5e:4x4"),
    "v5e_256": ("--topology", "v5e:16x16"),
    "v6e_8": ("--topology", "v6e:2x4"),
    "v5p_128": ("--topology", "v5p:4x4x4"),
}
GIB = 2**30
HEAD = "| `--config` | planned for | memory of a chip | step | utilisation | slowest | days |\n" + 7 * "|---" + "|"


def planned(name: str, changes: list[str]) -> dict:
    """The figures of one row; the process's own error where there are none."""
    command = [sys.executable, "-m", "faithdiff_jax", "plan", "--config", f"targets/{name}", *TARGETS[name], "--json"]
    done = subprocess.run([*command, *changes], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def row(name: str, plan: dict) -> str:
    memory = (sum(plan["bytes_held"].values()) + plan["bytes_temporary"]) / GIB
    low, high = plan["seconds_overlapped"], plan["seconds_one_by_one"]
    days = [seconds * plan["repeats"] / 86400 for seconds in (low, high)]
    used = "{:.0%} to {:.0%}".format(*plan["utilisation"])
    fits = f"{memory:.1f} of {plan['bytes_of_a_chip'] / GIB:.1f} GiB" + ("" if plan["fits"] else ", too much")
    slowest = max(plan["seconds"], key=plan["seconds"].get)
    cells = [f"`targets/{name}`", " ".join(TARGETS[name]), fits, f"{low:.3g} to {high:.3g} s", used, slowest]
    return f"| {' | '.join(cells)} | {days[0]:.3g} to {days[1]:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="NAME or key=value", help=f"of {', '.join(TARGETS)}; all if none")
    words = parser.parse_args().words
    names, changes = ([word for word in words if ("=" in word) == wanted] for wanted in (False, True))
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"{unknown[0]!r}: must be of {', '.join(TARGETS)}")
    print(HEAD, flush=True)
    for name in names or TARGETS:
        print(row(name, planned(name, changes)), flush=True)


if __name__ == "__main__":
    main()
