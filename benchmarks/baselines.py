"""RRDBNet on this machine: seconds beside PyTorch's and the largest difference, or the memory of a large picture.

    python benchmarks/baselines.py --size 256
    python benchmarks/baselines.py --memory 2048
    python benchmarks/baselines.py --seams MODEL_DIR --picture PHOTO

Seconds are the best of `--repeat` runs after one that compiles or warms up. Memory does not depend on the blocks, which
are scanned: it is measured with one of them. Seams: levels (of 255) that a picture changes by when it is restored in
windows, for margins of 8 to 96 pixels between what a window gives and where it ends.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for the PyTorch network

from faithdiff_jax.baselines.rrdbnet import RRDBNetConfig
from faithdiff_jax.baselines.rrdbnet_weights import NAMES, rrdbnet_shapes
from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer
from faithdiff_jax.files.images import load_image
from faithdiff_jax.models.parts import unflatten
from faithdiff_jax.weights.keymap import KeyMap


def timed(run: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Best wall-clock seconds, and the processor seconds of that run."""
    seconds = []
    for _ in range(repeat):
        wall, processor = time.perf_counter(), time.process_time()
        run()
        seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return min(seconds)


def speed(size: int, repeat: int) -> None:
    import torch
    from torch_rrdbnet import REAL_ESRGAN, TorchRRDBNet

    torch.manual_seed(0)
    network = TorchRRDBNet(REAL_ESRGAN).eval()
    arrays = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    config = RRDBNetConfig()
    keymap = KeyMap(NAMES["real-esrgan"], rrdbnet_shapes(config))
    params = jax.tree.map(jax.device_put, unflatten(dict(keymap.read(arrays.__getitem__))))
    restorer = RRDBNetRestorer(config, params)
    picture = np.random.default_rng(0).random((size, size, 3), np.float32)
    channels = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)[None]))

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return network(channels)[0].numpy().transpose(1, 2, 0)

    start = time.perf_counter()
    output = restorer.enlarge(picture)
    print(f"{jax.default_backend()}, {size}x{size} to {output.shape[1]}x{output.shape[0]}, float32")
    print(f"first call, with compilation  {time.perf_counter() - start:.1f} s")
    difference = np.abs(output - theirs()).max() / np.abs(output).max()
    for name, run in (("faithdiff-jax", lambda: restorer.enlarge(picture)), (f"torch {torch.__version__}", theirs)):
        wall, processor = timed(run, repeat)
        print(f"{name:<28}  {wall:.1f} s, {processor:.1f} s of processor time")
    print(f"largest relative difference   {difference:.1e}")


def memory(size: int) -> None:
    config = RRDBNetConfig(blocks=1)
    shapes = rrdbnet_shapes(config)
    params = unflatten({path: jax.device_put(np.zeros(shape, np.float32)) for path, shape in shapes.items()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    restored = RRDBNetRestorer(config, params).restore(np.zeros((size, size, 3), np.uint8))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{size}x{size} to {restored.shape[1]}x{restored.shape[0]}: {peak / 1e6:.2f} GB, {before / 1e6:.2f} before")


def seams(model_dir: Path, photo: Path) -> None:
    """The lower half of a strip of the photo, restored with a margin above it, against the whole strip's."""
    restorer = RRDBNetRestorer.load(model_dir)
    picture = load_image(photo).rgb[:320, :64].astype(np.float32) / 255
    whole = restorer.enlarge(picture)[160 * restorer.config.scale :]
    for margin in (8, 16, 32, 64, 96):
        lower = restorer.enlarge(picture[160 - margin :])[margin * restorer.config.scale :]
        difference = np.abs(lower - whole) * 255
        print(f"margin {margin:>2}: at most {difference.max():.2f} levels, {difference.mean():.4f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--memory", type=int, metavar="SIDE")
    parser.add_argument("--seams", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.memory)
    elif arguments.seams:
        seams(arguments.seams, arguments.picture)
    else:
        speed(arguments.size, arguments.repeat)


if __name__ == "__main__":
    main()
