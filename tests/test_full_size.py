"""The published size: minutes and gigabytes, so only with `make test-slow`, but for a try at a tiny one."""

import pathlib
import re
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


TINY = ("--size", "tiny", "--latent", "8", "--image", "64", "--steps", "2", "--repeats", "1")


def output_of(script: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments], check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def test_the_whole_benchmark_at_a_tiny_size():
    output = output_of("full_size.py", *TINY)
    errors = re.findall(r"largest relative error, (.*): (\S+)", output)
    assert [what for what, _ in errors] == ["one evaluation", "2 steps"]
    assert all(0 < float(error) <= 1e-4 for _, error in errors)


@pytest.mark.slow
def test_parity_with_all_parameters():
    """2.61 billion random parameters, each framework in its own process: 24 GiB of memory is enough."""
    output = output_of("full_size.py", "--latent", "64", "--repeats", "1")
    error = re.search(r"largest relative error, one evaluation: (\S+)", output)
    assert float(error[1]) <= 1e-4


@pytest.mark.slow
def test_conversion_of_a_full_checkpoint_stays_small(tmp_path):
    output = output_of("convert_full_size.py", str(tmp_path / "work"))
    peaks = [float(peak) for peak in re.findall(r"(\d+\.\d+) GiB", output)]
    assert len(peaks) == 2
    assert max(peaks) < 12
    assert "are the same, bit for bit, there and back" in output
