"""What tiles of the decoder change: published tiles, and tiles that share statistics, beside decoding at once.

    python benchmarks/decoder_tiles.py [PHOTOGRAPH] [--model DIR] [--side 768] [--vae-tile 256]

The photograph, one of scikit-image's by default (extra `examples`), is encoded at once. PSNR and the largest difference
are of what the decoder gives, over -1 to 1; seconds are of decoding, compiling included where a size is new.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.files import images
from faithdiff_jax.inference.decoding import decode
from faithdiff_jax.inference.options import RestoreOptions

AT_ONCE = 2**14


def photograph(path: pathlib.Path | None) -> np.ndarray:
    if path is not None:
        return images.load_image(path).rgb
    import skimage.data

    return np.asarray(skimage.data.astronaut())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", nargs="?", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=SMALL_MODEL)
    parser.add_argument("--side", type=int, default=768, help="in pixels")
    parser.add_argument("--vae-tile", type=int, default=256)
    parser.add_argument("--passes", type=int, nargs="+", default=(1, 2, 4, 20))
    given = parser.parse_args()
    model = FaithDiff.load(given.model)
    picture = photograph(given.photograph)
    square = picture[: min(picture.shape[:2]), : min(picture.shape[:2])]
    image = images.to_float(images.upscale(square, given.side / len(square)))[None]
    side = given.side // model.config.vae.factor
    shape = (1, side, side, model.config.vae.latent_channels)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    latents = np.asarray(model.encode(image, noise, vae_tile=AT_ONCE))
    whole = np.asarray(model.decode(latents, vae_tile=AT_ONCE))

    def report(name: str, run: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        found = np.asarray(run())
        seconds = time.perf_counter() - begin
        error = np.mean((np.clip(found, -1, 1) - np.clip(whole, -1, 1)) ** 2)
        psnr, largest = 10 * np.log10(4 / error), np.abs(found - whole).max()
        print(f"{name:12} {psnr:8.2f} dB {largest:8.4f} {seconds:8.1f} s", flush=True)

    report("published", lambda: model.decode(latents, vae_tile=given.vae_tile))
    for passes in given.passes:
        options = RestoreOptions(vae_tile=given.vae_tile, decoder_passes=passes)
        report(f"{passes} passes", lambda options=options: decode(model, latents, options))


if __name__ == "__main__":
    main()
