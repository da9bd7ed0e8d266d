"""An RRDBNet in ncnn's two files, as its converter lays them out."""

import pathlib
import struct

import numpy as np

LINEAR, RELU = "1=3 4=1 5=1", "1=3 4=1 5=1 9=2 -23310=1,2.000000e-01"


def write_ncnn(path: pathlib.Path, state: dict, blocks: int, *, half: bool = True) -> list[str]:
    """Write `path`.param and .bin of a Real-ESRGAN state dict (NumPy); returns the lines of the former."""
    body = [f"body.{b}.rdb{d}.conv{c}" for b in range(blocks) for d in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
    names = ["conv_first", *body, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    linear = ("conv_first", "conv_body", "conv_last")
    lines, data = ["Input input 0 1 data"], b""
    for name in names:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        options = LINEAR if name in linear or name.endswith("conv5") else RELU
        if name in ("conv_up1", "conv_up2"):
            lines.append(f"Interp r_{name} 1 1 x x 0=1 1=2.000000e+00 2=2.000000e+00")
        lines.append(f"Convolution {name} 1 1 x x 0={weight.shape[0]} {options} 6={weight.size}")
        if name.startswith("body"):
            added = "Eltwise add 2 1 x x x 0=1 -23301=2,2.000000e-01,1.000000e+00"
            lines += [added] * (1 + name.endswith("rdb3.conv5")) if name.endswith("conv5") else ["Concat c 2 1 x x x"]
        if name == "conv_body":
            lines.append("BinaryOp add 2 1 x x x")
        if name == "conv_first":
            lines.append("Split s 1 2 x x x")
        weights = weight.astype("<f2" if half else "<f4").tobytes()
        data += struct.pack("<I", 0x01306B47 if half else 0) + weights + b"\0" * (-len(weights) % 4)
        data += bias.astype("<f4").tobytes()
    lines = ["7767517", f"{len(lines)} 9", *lines]
    path.with_suffix(".param").write_text("\n".join(lines) + "\n")
    path.with_suffix(".bin").write_bytes(data)
    return lines


def rounded(state: dict) -> dict[str, np.ndarray]:
    """The weights as float16 has them."""
    return {
        name: array.astype(np.float16).astype(np.float32) if array.ndim == 4 else array for name, array in state.items()
    }
