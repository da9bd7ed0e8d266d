"""Memory and time of results up to 16,384x16,384, made part by part by `faithdiff restore` in a process of its own.

    python benchmarks/huge.py WORK --sides 4096 16384
    python benchmarks/huge.py WORK --sides 8192 --model DIR --format tif steps=4

Without a model, one of random parameters is made: the geometry of SDXL (a factor of 8, 4 latent channels, tiles of 128
latent pixels with an overlap of a half), in networks that are small enough for a CPU. What does not depend on the
widths of the networks is as with SDXL: the picture, its rows, the latents and all that the sampler makes of them. The
picture is a quarter of the result on each side. Memory is the peak resident memory of the process; `--baseline` shows
that of a result of 512x512, made at once.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

from faithdiff_jax.config import find_config, load
from faithdiff_jax.files import images
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.weights.initialisation import fresh_params, write_model

SMALL = (
    "vae.channels=[4,4,8,16]", "vae.norm_groups=4", "vae.latent_channels=4",
    "unet.in_channels=4", "unet.out_channels=4", "unet.channels=[16,32]", "unet.norm_groups=8",
    "unet.transformer_depth=[0,1]", "unet.heads=[1,2]", "alignment.norm_groups=8", "alignment.heads=2",
)  # fmt: skip
OPTIONS = {"steps": "2", "guidance": "1", "color_fix": "adain", "vae_tile": "512"}


def make_model(folder: pathlib.Path) -> None:
    config = load(FaithDiffConfig, find_config("tiny/model"), SMALL)
    defaults = {"scale": 4.0}
    tokenizers = pathlib.Path(__file__).parents[1] / "configs" / "tiny"
    write_model(config, fresh_params(config, 0), tokenizers, folder, {"recipe": "benchmarks/huge.py"}, defaults)


def make_picture(path: pathlib.Path, side: int) -> None:
    """Something with all frequencies: noise at three sizes over a slope."""
    rng, total = np.random.default_rng(0), np.zeros((side, side, 3), np.float32)
    for coarse in (16, 128, side):
        noise = rng.integers(0, 256, (coarse, coarse, 3), np.uint8)
        total += images.upscale(noise, side / coarse) / 3
    images.save_image(path, total.astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path, help="folder, on a disk with room for what is kept")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of RestoreOptions, but for scale")
    parser.add_argument("--sides", type=int, nargs="+", default=(4096, 16384))
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--format", choices=("png", "tif"), default="png")
    parser.add_argument("--baseline", action="store_true", help="one small result first")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    model = given.model or given.work / "model"
    if not model.exists():
        make_model(model)
    options = OPTIONS | dict(option.split("=", 1) for option in given.options)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    for side in [512] * given.baseline + list(given.sides):
        picture, output = given.work / f"{side // 4}.png", given.work / f"restored_{side}"
        if not picture.exists():
            make_picture(picture, side // 4)
        shutil.rmtree(output, ignore_errors=True)
        above = [] if side == 512 else ["--stream-above", "1"]
        command = [sys.executable, "-m", "faithdiff_jax", "restore", "--model", str(model), "--input", str(picture)]
        command += ["--output", str(output), "--scale", "4", "--format", given.format, "--cache", "", *flags, *above]
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(given.work.resolve())})
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        record = json.loads((output / "manifest.jsonl").read_text().splitlines()[-1])
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in record["seconds"].items())
        spent, written = usage.ru_utime + usage.ru_stime, (output / f"{side // 4}.{given.format}").stat().st_size
        print(
            f"{side}x{side}: {usage.ru_maxrss / 2**20:.2f} GiB at most, {time.perf_counter() - begin:.0f} s "
            f"({spent:.0f} CPU s): {stages}; file {written / 1e6:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
