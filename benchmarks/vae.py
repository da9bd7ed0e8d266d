"""SDXL's VAE at full size, ours and PyTorch's: seconds to encode and decode a picture, and the largest relative error.

    python benchmarks/vae.py                  # 512x512, float32 on CPU

Each framework runs in processes of its own, in turns, on the same random parameters, picture and latent.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile

import numpy as np
from paired import FACTOR, LATENT_CHANNELS, TorchNetworks, in_turns, measure, our_config, our_parameters, relative_error

TASKS = ("encode", "decode")


def inputs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (1, side, side, 3) in [-1, 1] and a latent (1, side / 8, side / 8, 4)."""
    rng = np.random.default_rng(0)
    latent = (1, side // FACTOR, side // FACTOR, LATENT_CHANNELS)
    return rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32), rng.standard_normal(latent, np.float32)


def ours(options: argparse.Namespace, folder: pathlib.Path) -> dict:
    import jax
    import jax.numpy as jnp

    from faithdiff_jax.models.parts import Networks, unflatten

    config = our_config("sdxl")
    params = unflatten({path: jnp.asarray(array) for path, array in our_parameters(config, "vae")})
    networks = Networks(config, jnp.float32)
    image, latent = map(jnp.asarray, inputs(options.side))
    tasks = {
        "encode": (jax.jit(lambda params, x: networks.vae(params).moments(x)), image),
        "decode": (jax.jit(lambda params, x: networks.vae(params).decode(x)), latent * config.vae.scaling_factor),
    }
    report = {}
    for name, (program, x) in tasks.items():
        report[name], result = measure(lambda program=program, x=x: np.asarray(program(params, x)), options.repeats)
        np.save(folder / f"ours_{name}.npy", result)
    return report


def reference(options: argparse.Namespace, folder: pathlib.Path) -> dict:
    import torch

    vae = TorchNetworks("sdxl", "cpu", dtype=torch.float32, parts=("vae",)).vae
    image, latent = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in inputs(options.side))
    tasks = {
        "encode": lambda: vae.quant_conv(vae.encoder(image)),
        "decode": lambda: vae.decode(latent).sample,
    }
    report = {}
    with torch.no_grad():
        for name, run in tasks.items():
            report[name], result = measure(run, options.repeats)
            np.save(folder / f"reference_{name}.npy", result.numpy().transpose(0, 2, 3, 1))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--repeats", type=int, default=2, help="in each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="times that the two frameworks take turns")
    parser.add_argument("--child", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"ours": ours, "reference": reference}[options.child](options, options.folder)))
        return

    with tempfile.TemporaryDirectory() as folder:
        reports = in_turns(__file__, options.rounds, folder)
        errors = {
            task: relative_error(*(pathlib.Path(folder) / f"{who}_{task}.npy" for who in reports)) for task in TASKS
        }
    print(f"{options.side}x{options.side}, float32, {os.cpu_count()} cores")
    print(f"{'':12}{'ours, s':>12}{'PyTorch, s':>12}{'ratio':>8}{'error':>10}")
    for task in TASKS:
        times = [statistics.median(s for report in reports[who] for s in report[task]) for who in reports]
        print(f"{task:12}{times[0]:12.2f}{times[1]:12.2f}{times[0] / times[1]:8.2f}{errors[task]:10.1e}")


if __name__ == "__main__":
    main()
