"""Pictures and folders of pictures that the data tests share."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def coordinates(height: int, width: int) -> np.ndarray:
    """A uint8 picture whose pixels say where they are: red the column, green the row, blue the 256ths of both."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns % 256, rows % 256, columns // 256 * 16 + rows // 256], axis=-1).astype(np.uint8)


def encode(image: np.ndarray, name: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, name, **options)
    return file.getvalue()


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def write_caption(path: Path, caption: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"caption": caption}), encoding="utf-8")
    return path


def write_pairs(folder: Path, count: int = 3, size: tuple[int, int] = (80, 96)) -> Path:
    """The published layout: HR_crops, LR_crops and Caption, with pictures that differ by their blue."""
    height, width = size
    for number in range(count):
        hq, lq = coordinates(height, width), coordinates(height // 4, width // 4)
        hq[..., 2] = lq[..., 2] = number % 256
        write(folder / "HR_crops" / f"{number:03}.png", hq)
        write(folder / "LR_crops" / f"{number:03}.png", lq)
        write_caption(folder / "Caption" / f"{number:03}.json", f"The image features picture {number}.")
    return folder
