"""Seconds and peak memory of the metrics, ours and pyiqa's, on the same pictures in one run.

    python benchmarks/metrics.py                                          # ours alone, or beside pyiqa if it is here
    python benchmarks/metrics.py --pyiqa ENVIRONMENT/bin/python           # pyiqa of another environment

Each framework has a process of its own, which stays; they take turns, a few pictures of one metric at a time, so that
whatever else the machine does is fair to both. Reading weights, compilation and a first picture are not counted.
pyiqa gets random weights where it would download them (time does not depend on them) and NIQE's own parameters.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import cv2
import numpy as np

METRICS = ("psnr", "ssim", "lpips", "dists", "niqe")
AT_A_TIME = 5
ROOT = pathlib.Path(__file__).parent.parent

Function = Callable[[np.ndarray, np.ndarray], float]


def pair(index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with structure at all scales, and the same one smoothed; (side, side, 3) uint8."""
    rng = np.random.default_rng(index)
    layers = [rng.normal(0, 60 / 2**i, (2 ** (i + 2), 2 ** (i + 2), 3)).astype(np.float32) for i in range(6)]
    total = sum(cv2.resize(layer, (side, side), interpolation=cv2.INTER_CUBIC) for layer in layers)
    original = np.clip(128 + total + rng.normal(0, 3, (side, side, 3)), 0, 255).astype(np.uint8)
    return cv2.GaussianBlur(original, (0, 0), 1.2), original


def ours() -> dict[str, Function]:
    from faithdiff_jax.evaluation.metrics import make_metric

    metrics = {name: make_metric(name, "paper") for name in METRICS}
    return {
        name: (lambda x, y, metric=metric: metric(x, y if metric.info.needs_reference else None))
        for name, metric in metrics.items()
    }


def pyiqas() -> dict[str, Function]:
    import scipy.io
    import torch

    from faithdiff_jax.evaluation.metrics.pyiqa_backend import import_pyiqa
    from faithdiff_jax.evaluation.metrics.weights import shipped

    pyiqa = import_pyiqa()
    import torchvision

    for name in ("alexnet", "vgg16"):
        build = getattr(torchvision.models, name)
        setattr(torchvision.models, name, lambda weights=None, pretrained=None, build=build: build(weights=None))
    with tempfile.TemporaryDirectory() as folder:
        pristine, path = shipped("niqe"), f"{folder}/niqe.mat"
        scipy.io.savemat(path, {"mu_prisparam": pristine["mean"], "cov_prisparam": pristine["covariance"]})
        options = {
            "lpips": {"pretrained": False},
            "dists": {"pretrained": False},
            "niqe": {"pretrained_model_path": path},
        }
        metrics = {name: pyiqa.create_metric(name, device="cpu", **options.get(name, {})) for name in METRICS}

    def function(name: str) -> Function:
        tensor = lambda picture: torch.from_numpy(picture).permute(2, 0, 1)[None] / 255  # noqa: E731
        if name == "niqe":
            return lambda x, y: float(metrics[name](tensor(x)))
        return lambda x, y: float(metrics[name](tensor(x), tensor(y)))

    return {name: function(name) for name in METRICS}


def work(functions: dict[str, Function], side: int, answers) -> None:
    """Answer lines of a metric and the numbers of pictures with seconds and figures; the first is not counted."""
    for function in functions.values():
        function(*pair(0, side))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, begin, end = json.loads(line)
        pairs = [pair(index, side) for index in range(begin, end)]
        start, used = time.perf_counter(), time.process_time()
        figures = [functions[name](*both) for both in pairs]
        seconds = time.perf_counter() - start, time.process_time() - used
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([*seconds, figures, memory]), file=answers, flush=True)


class Worker:
    """A process that computes one framework's metrics."""

    def __init__(self, framework: str, python: str, side: int):
        command = [python, __file__, "--framework", framework, "--side", str(side)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.answer() == "ready"

    def ask(self, *question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]}: ended with {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--pyiqa", help="the Python that has pyiqa; default this one, if it has")
    parser.add_argument("--framework", choices=("ours", "pyiqa"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.framework:
        answers, sys.stdout = sys.stdout, sys.stderr  # pyiqa prints
        return work({"ours": ours, "pyiqa": pyiqas}[options.framework](), options.side, answers)
    pyiqa = options.pyiqa or (importlib.util.find_spec("pyiqa") and sys.executable)
    workers = {"ours": Worker("ours", sys.executable, options.side)}
    if pyiqa:
        workers["pyiqa"] = Worker("pyiqa", pyiqa, options.side)
    wall, used = collections.Counter(), collections.Counter()
    figures, memory = collections.defaultdict(list), {}
    for begin in range(0, options.pictures, AT_A_TIME):
        for metric in METRICS:
            for name, worker in workers.items():
                answer = worker.ask(metric, begin, min(begin + AT_A_TIME, options.pictures))
                wall[name, metric] += answer[0]
                used[name, metric] += answer[1]
                figures[name, metric] += answer[2]
                memory[name] = answer[3]
    print(f"{options.pictures} pictures of {options.side}x{options.side}; seconds, and CPU seconds of all threads\n")
    print("| |", " | ".join(workers), "|\n|---|" + "---|" * len(workers))
    for metric in METRICS:
        cells = (f"{wall[name, metric]:.2f} s ({used[name, metric]:.2f})" for name in workers)
        print(f"| {metric} |", " | ".join(cells), "|")
    sums = {name: [sum(times[name, metric] for metric in METRICS) for times in (wall, used)] for name in workers}
    print("| all |", " | ".join(f"{seconds:.1f} s ({cpu:.1f})" for seconds, cpu in sums.values()), "|")
    print("| peak memory |", " | ".join(f"{memory[name]:.2f} GiB" for name in workers), "|")
    for metric in ("psnr", "ssim", "niqe") if pyiqa else ():
        difference = np.abs(np.subtract(figures["ours", metric], figures["pyiqa", metric])).max()
        print(f"largest difference of {metric}: {difference:.1e}")


if __name__ == "__main__":
    main()
