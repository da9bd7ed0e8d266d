"""The whole chain on a toy: published-layout weights -> convert -> restore two photographs -> back to PyTorch's layout.

    python examples/demo.py                           # toy weights, seconds
    python examples/demo.py --model models/faithdiff  # converted weights: restored photographs

The toy has the published architecture at a small size and random weights, so its pictures show noise in the colours of
the input. It is there to try an installation and the commands without a download of gigabytes.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

import numpy as np

from faithdiff_jax.cli import convert, infer
from faithdiff_jax.config import FaithDiffConfig
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.unet import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import checkpoint, rules
from faithdiff_jax.weights.convert import FAITHDIFF_PARTS
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.safetensors_file import write_tensors

HERE = pathlib.Path(__file__).parent
START, END = "<|startoftext|>", "<|endoftext|>"
LEVELS = 4
TOY = FaithDiffConfig(
    unet=UNetConfig(
        channels=(32, 64),
        resnets_per_level=1,
        transformer_depth=(0, 2),
        mid_transformer_depth=2,
        heads=(2, 4),
        context_dim=64,
        pooled_dim=32,
        time_id_dim=16,
    ),
    vae=VAEConfig(channels=(32,) * LEVELS, resnets_per_level=1),
    alignment=AlignmentConfig(),
    text_encoders=tuple(
        TextEncoderConfig(
            vocab_size=514, width=32, layers=2, heads=2, mlp_width=64, end_token=513, projection=projection,
            activation="gelu" if projection else "quick_gelu",
        )
        for projection in (None, 32)
    ),
)  # fmt: skip


def main() -> int:
    """Run the chain; returns the exit code of what failed first, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a converted model directory instead of the toy")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path(".demo"), help="folder for the toy")
    parser.add_argument("--output", default="restored")
    options = parser.parse_args()

    model = options.model
    if not model:
        model = str(options.work / "model")
        published = write_toy(options.work)
        print("converting the toy's published-layout weights")
        code = convert.main([*published, "--output", model])
        if code:
            return code

    print("restoring examples/photos")
    restore = ["--model", model, "--input", str(HERE / "photos"), "--output", options.output, "--scale", "4"]
    code = infer.main([*restore, "--captions", str(HERE / "captions"), "--overwrite"])
    if code or options.model:
        return code

    print("converting back to PyTorch's layout")
    back = options.work / "FaithDiff.safetensors"
    code = convert.main(["--to-torch", model, "--output", str(back)])
    if code:
        return code
    same = back.read_bytes() == (options.work / "published" / "FaithDiff.safetensors").read_bytes()
    print("there and back, every byte is the same" if same else "there and back, the files differ")
    print("the toy's weights are random, so its pictures are noise: --model takes converted ones")
    return 0 if same else 1


def write_toy(work: pathlib.Path) -> list[str]:
    """Write random weights in the published layout; returns the converter's flags for them."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "published"
    rng = np.random.default_rng(0)
    sdxl, vae = folder / "sdxl", folder / "vae"
    clip = {f"text_encoder{suffix}": [rule for rule in rules.TEXT_ENCODER] for suffix in ("", "_2")}
    for part, part_rules in {"vae": rules.VAE, **clip}.items():
        target = vae if part == "vae" else sdxl / part
        name = "diffusion_pytorch_model" if part == "vae" else "model"
        write_random(target / f"{name}.safetensors", {part: part_rules}, rng)
    write_random(folder / "FaithDiff.safetensors", FAITHDIFF_PARTS, rng)

    unet, text = TOY.unet, TOY.text_encoders
    configs = {
        sdxl / "unet": {
            "block_out_channels": unet.channels, "layers_per_block": 1, "attention_head_dim": unet.heads,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2],
            "cross_attention_dim": unet.context_dim, "use_linear_projection": True, "norm_num_groups": 32,
            "addition_embed_type": "text_time", "addition_time_embed_dim": unet.time_id_dim,
            "projection_class_embeddings_input_dim": unet.pooled_dim + 6 * unet.time_id_dim,
        },
        vae: {
            "block_out_channels": TOY.vae.channels, "layers_per_block": 1, "latent_channels": 4,
            "down_block_types": ["DownEncoderBlock2D"] * LEVELS, "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
            "norm_num_groups": 32, "scaling_factor": TOY.vae.scaling_factor,
        },
    }  # fmt: skip
    for i, encoder in enumerate(text):
        configs[sdxl / f"text_encoder{'_2' * i}"] = {
            "architectures": ["CLIPTextModelWithProjection" if encoder.projection else "CLIPTextModel"],
            "vocab_size": encoder.vocab_size, "hidden_size": encoder.width, "intermediate_size": encoder.mlp_width,
            "num_hidden_layers": encoder.layers, "num_attention_heads": encoder.heads, "hidden_act": encoder.activation,
            "max_position_embeddings": 77, "eos_token_id": 2, "projection_dim": encoder.projection or encoder.width,
        }  # fmt: skip
        write_tokenizer(sdxl / f"tokenizer{'_2' * i}", pad_token="!" if i else END)
    for target, settings in configs.items():
        (target).mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(settings))
    scheduler = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
    }  # fmt: skip
    (sdxl / "scheduler").mkdir()
    (sdxl / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return ["--sdxl", str(sdxl), "--vae", str(vae), "--faithdiff", str(folder / "FaithDiff.safetensors")]


def write_random(path: pathlib.Path, parts: dict, rng: np.random.Generator) -> None:
    """One safetensors file with every tensor of the parts: scales near one, matrices that keep activations near one."""
    shapes = {}
    for part, part_rules in parts.items():
        shapes |= KeyMap(part_rules, checkpoint.part_shapes(TOY, part)).published_shapes()
    specs = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}

    def tensors():
        for name, shape in shapes.items():
            spread = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            is_scale = len(shape) == 1 and name.endswith("weight")
            yield name, (spread * rng.standard_normal(shape) + is_scale).astype(np.float32)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, specs, tensors())


def write_tokenizer(folder: pathlib.Path, *, pad_token: str) -> None:
    """A CLIP tokenizer that knows single bytes only."""
    folder.mkdir(parents=True)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
        "unk_token": END, "pad_token": pad_token,
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    sys.exit(main())
