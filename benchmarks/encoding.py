"""What the service encodes for each picture: CPU time of the thread that does it, the least of several rounds.

    python benchmarks/encoding.py [PHOTOGRAPH] [--scales 2 4]

The photograph, one of scikit-image's by default (extra `examples`), is enlarged by Lanczos.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable

from decoder_tiles import photograph
from PIL import Image

from faithdiff_jax.files import images
from faithdiff_jax.files.rows import save_restored
from faithdiff_jax.service.worker import encoded

ROUNDS = 3


def thread_seconds(act: Callable[[], object]) -> float:
    begin = time.thread_time()
    act()
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", nargs="?", type=pathlib.Path)
    parser.add_argument("--scales", type=int, nargs="+", default=(2, 4))
    given = parser.parse_args()
    picture = photograph(given.photograph)
    with tempfile.TemporaryDirectory() as folder:
        file, target = (pathlib.Path(folder, name) for name in ("source.png", "restored.png"))
        Image.fromarray(picture).save(file)
        source = images.load_image(file)
        for scale in given.scales:
            large = images.upscale(picture, scale)
            acts: dict[str, Callable[[], object]] = {
                "a preview": lambda large=large: encoded(large),
                "the result": lambda large=large, scale=scale: save_restored(target, large, source, scale, "{}"),
            }
            for name, act in acts.items():
                least = min(thread_seconds(act) for _ in range(ROUNDS))
                print(f"{large.shape[1]}x{large.shape[0]} {name:10} {1000 * least:7.0f} ms", flush=True)


if __name__ == "__main__":
    main()
