"""The same networks in both frameworks, on the same random numbers: what the benchmarks beside PyTorch share.

`SIZES` names the sizes. Ours are a `FaithDiffConfig` and its parameters; theirs are diffusers' UNet, VAE and encoder,
transformers' text encoders and the tests' copy of the aligner. Each framework is imported by its own functions only, so
that a process has one of them.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

LATENT_CHANNELS, FACTOR, TOKENS = 4, 8, 77
HEAD, TIME_IDS, VOCABULARY = 64, 256, 49408
# Widths of the UNet's levels, of the VAE's, and of the two text encoders with their layers; all of SDXL's shape.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "unet": (32, 64),
        "vae": (8, 16, 32, 32),
        "text": ((16, 2), (16, 2)),
        "depth": (0, 1),
        "groups": 8,
    },
    "small": {
        "unet": (64, 128, 256),
        "vae": (32, 64, 128, 128),
        "text": ((128, 4), (256, 4)),
        "depth": (0, 2, 10),
        "groups": 32,
    },
    "sdxl": {
        "unet": (320, 640, 1280),
        "vae": (128, 256, 512, 512),
        "text": ((768, 12), (1280, 32)),
        "depth": (0, 2, 10),
        "groups": 32,
    },
}


def published_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random numbers that both frameworks use for one tensor: matrices keep activations near one.

    They are drawn from a generator that is seeded with the tensor's published name.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return (0.1 * rng.standard_normal(shape, np.float32) + np.float32(name.endswith("weight"))).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)


def drawn(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """`published_tensor` of every name, in order, drawn by all processors a few tensors ahead."""
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead: collections.deque[tuple[str, concurrent.futures.Future[np.ndarray]]] = collections.deque()
        for name, shape in shapes.items():
            ahead.append((name, pool.submit(published_tensor, name, shape)))
            if len(ahead) > 2 * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()


def heads_of(width: int) -> int:
    """The width of one attention head of a text encoder."""
    return min(64, width // 2)


def our_config(size: str, mixing: str = "none", group: int | None = None) -> Any:
    """The `FaithDiffConfig` of one of `SIZES`."""
    from faithdiff_jax.config import from_dict
    from faithdiff_jax.models.config import FaithDiffConfig

    of = SIZES[size]
    (first, layers), (second, more_layers) = of["text"]
    encoder = {"vocab_size": VOCABULARY, "end_token": VOCABULARY - 1}
    widths, depth = of["unet"], of["depth"]
    return from_dict(FaithDiffConfig, {
        "unet": {
            "channels": widths, "transformer_depth": depth, "mid_transformer_depth": depth[-1],
            "heads": [max(1, width // HEAD) for width in widths], "context_dim": first + second, "pooled_dim": second,
            "time_id_dim": TIME_IDS, "norm_groups": of["groups"],
        },
        "vae": {"channels": of["vae"], "norm_groups": of["groups"]},
        "alignment": {"mixing": mixing, "group": group},
        "text_encoders": [
            encoder | {"width": first, "layers": layers, "heads": first // heads_of(first), "mlp_width": 4 * first},
            encoder | {"width": second, "layers": more_layers, "heads": second // heads_of(second),
                       "mlp_width": 4 * second, "activation": "gelu", "projection": second},
        ],
    }, "the benchmark")  # fmt: skip


def our_parameters(config: Any, part: str) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of a part of ours, float32: the published tensors, renamed by the project's own rules."""
    from faithdiff_jax.models.parts import part_shapes
    from faithdiff_jax.weights import rules
    from faithdiff_jax.weights.keymap import KeyMap

    keymap = KeyMap(rules.of_part(part), part_shapes(config, part))
    prefix = "" if part in rules.FAITHDIFF_PARTS else part + "."
    tensors = drawn({prefix + name: shape for name, shape in keymap.published_shapes().items()})
    # Tensors are asked for in the order of their shapes.
    yield from keymap.read(lambda name: _next(tensors, prefix + name))


def _next(tensors: Iterator[tuple[str, np.ndarray]], name: str) -> np.ndarray:
    found, array = next(tensors)
    if found != name:
        raise AssertionError(f"{name} was asked for when {found} was next")
    return array


class TorchNetworks:
    """FaithDiff in PyTorch: `unet` with the aligner behind its first convolution, `lq_encoder`, `vae`, `text_encoders`.

    Before a call of `unet`, `features` must be what `lq_encoder` gives.
    """

    features: Any

    def __init__(
        self,
        size: str,
        device: str,
        *,
        dtype: Any,
        frozen_dtype: Any = None,
        channels_last: bool = False,
        parts: Collection[str] = ("unet", "lq_encoder", "vae", "text_encoders"),
    ):
        """Build and fill them.

        Args:
            size: one of `SIZES`.
            device: "cpu" or "cuda".
            dtype: of UNet, aligner and LQ encoder.
            frozen_dtype: of VAE and text encoders; `dtype` by default.
            channels_last: whether convolutions lie as NVIDIA's tensor cores want them.
            parts: which of them; the aligner comes with the UNet.
        """
        import diffusers
        import torch
        import transformers
        from diffusers.models.autoencoders.vae import Encoder

        sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
        from torch_aligner import TorchAligner

        of = SIZES[size]
        widths, depth, vae_widths = of["unet"], of["depth"], of["vae"]
        (first, layers), (second, more_layers) = of["text"]
        attends = [bool(count) for count in depth]
        encoder = {
            "block_out_channels": vae_widths, "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
            "norm_num_groups": of["groups"],
        }  # fmt: skip

        def text_encoder(width: int, layers: int, projection: int | None) -> torch.nn.Module:
            config = transformers.CLIPTextConfig(
                vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // heads_of(width), hidden_act="gelu" if projection else "quick_gelu",
                projection_dim=projection or width, eos_token_id=2,
            )  # fmt: skip
            made = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
            return made(config)

        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(
                block_out_channels=widths, cross_attention_dim=first + second, norm_num_groups=of["groups"],
                down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
                up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attends[::-1]],
                transformer_layers_per_block=[max(1, count) for count in depth], use_linear_projection=True,
                attention_head_dim=[max(1, width // HEAD) for width in widths], addition_embed_type="text_time",
                addition_time_embed_dim=TIME_IDS,
                projection_class_embeddings_input_dim=second + 6 * TIME_IDS,
            )  # fmt: skip
            vae = diffusers.AutoencoderKL(
                **encoder, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENT_CHANNELS,
                scaling_factor=0.13025,
            )  # fmt: skip
            lq_encoder = Encoder(**encoder, out_channels=LATENT_CHANNELS)
            aligner = TorchAligner(vae_widths[-1], widths[0])
            one, two = text_encoder(first, layers, None), text_encoder(second, more_layers, second)
        lq_encoder.conv_norm_out = lq_encoder.conv_act = lq_encoder.conv_out = torch.nn.Identity()
        # transformers leaves the first component out of this class's names, and puts it back in files.
        has_prefix = next(iter(one.state_dict())).startswith("text_model.")

        def filled(module: torch.nn.Module, prefix: str, dtype: torch.dtype) -> Any:
            shapes = {prefix + name: tuple(value.shape) for name, value in module.named_parameters()}
            for name, array in drawn(shapes):
                owner, _, last = name.removeprefix(prefix).rpartition(".")
                tensor = torch.from_numpy(array).to(device, dtype)
                if channels_last and tensor.ndim == 4:
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
                setattr(module.get_submodule(owner), last, torch.nn.Parameter(tensor))
            for name, buffer in list(module.named_buffers()):  # the text encoders' position ids
                owner, _, last = name.rpartition(".")
                setattr(module.get_submodule(owner), last, torch.arange(buffer.shape[-1], device=device)[None])
            return module.eval()

        frozen_dtype = frozen_dtype or dtype
        if "lq_encoder" in parts:
            self.lq_encoder = filled(lq_encoder, "denoise_encoder.", dtype)
        if "vae" in parts:
            self.vae = filled(vae, "vae.", frozen_dtype).requires_grad_(False)
        if "text_encoders" in parts:
            self.text_encoders = (
                filled(one, "text_encoder." + "text_model." * (not has_prefix), frozen_dtype).requires_grad_(False),
                filled(two, "text_encoder_2.", frozen_dtype).requires_grad_(False),
            )
        if "unet" in parts:
            self.unet, self.aligner = filled(unet, "", dtype), filled(aligner, "", dtype)
            self.unet.conv_in.register_forward_hook(lambda module, args, hidden: self.aligner(hidden, self.features))


def in_turns(script: str, rounds: int, folder: str) -> dict[str, list[dict[str, Any]]]:
    """What the script prints last, as JSON, for "ours" and for "reference", each in processes of its own, in turns.

    The script is called as this process was, with `--child` and a folder for files.
    """
    reports: dict[str, list[dict[str, Any]]] = {"ours": [], "reference": []}
    for _ in range(rounds):
        for name, found in reports.items():
            command = [sys.executable, script, *sys.argv[1:], "--child", name, "--folder", folder]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return reports


def relative_error(first: pathlib.Path, second: pathlib.Path) -> float:
    """The largest difference of two saved arrays, divided by the second's largest value."""
    a, b = np.load(first).astype(np.float64), np.load(second).astype(np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def measure(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each call after one to warm up, and what that one returned."""
    first = run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds, first
