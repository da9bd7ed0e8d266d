"""Write the pictures that the small model is trained, chosen and judged by, each with its caption.

    python examples/tiny/training_photos.py --photographs photographs --output photos

    photos/train/photos/   photographs; tinted textures
    photos/train/drawn/    pictures that are drawn: leaves, pages of text, charts
    photos/validation/     photographs to choose settings by
    photos/test/           photographs to report on
    photos/example/        the middles of chelsea, coffee and camera, which examples/ restores

Nothing of the last three is under train/. `photographs.tsv` says which photograph goes where; --photographs is the
folder that gather_photographs.py filled, and scikit-image (`pip install 'faithdiff-jax[examples]'`) bundles the rest.
The same pictures come out on every run.
"""

import argparse
import dataclasses
import io
import pathlib
import sys

import numpy as np
import skimage.data
from photographs import Photograph, read_manifest
from PIL import Image, ImageDraw, ImageFont

from faithdiff_jax.cli import command
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import write_caption
from faithdiff_jax.files.writing import refuse_existing, whole

SIDE = 512
LEAVES, PAGES, CHARTS = 24, 6, 6


@dataclasses.dataclass(frozen=True)
class Tinted:
    """A gray texture of scikit-image's in colours of its own: RGB from black to white."""

    name: str
    colours: tuple[tuple[int, int, int], ...]
    caption: str


TINTED = {
    "brick_red": Tinted(
        "brick",
        ((40, 18, 14), (176, 82, 58), (250, 222, 204)),
        "The image features a brick wall with narrow joints. The bricks are red and rough.",
    ),
    "grass_green": Tinted(
        "grass",
        ((8, 22, 6), (92, 132, 46), (240, 246, 188)),
        "The image features a dense lawn of green grass. Its blades point in all directions.",
    ),
    "grass_dry": Tinted(
        "grass",
        ((22, 12, 8), (150, 108, 66), (252, 236, 206)),
        "The image features dry grass and weeds. The blades are brown and point in all directions.",
    ),
    "gravel_brown": Tinted(
        "gravel",
        ((24, 20, 22), (138, 122, 104), (246, 242, 232)),
        "The image features gravel of many small stones. The stones are brown and gray.",
    ),
}
HALVED = "astronaut", "rocket", "retina", "hubble_deep_field", "ihc", "grass_dry", "gravel"
"""Of which a copy of half the size is written as well: the same things, smaller and sharper."""
ONLY_HALVED = ("retina",)
DRAWN = {
    "leaves": "The image features overlapping round and angular shapes of many colours.",
    "page": "The image features a page of printed text. The letters are of several sizes.",
    "chart": "The image features drawn lines, circles and squares on a plain ground.",
}
CAPTIONS = [
    *(photograph.caption for photograph in read_manifest() if photograph.split == "train"),
    *(tinted.caption for tinted in TINTED.values()),
    *DRAWN.values(),
]
"""Of the pictures under train/."""
WORDS = """
    light water stone river morning window paper garden letter number small large under over between before after
    often never always quick slow bright dark north south west east one two three four five six seven eight nine
    of and the to in a is that it was for on are with as at be this have from or by not but what all were when
"""


def main(argv: list[str] | None = None) -> int:
    """Write the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=pathlib.Path, required=True, help="what gather_photographs.py wrote")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args(argv)
    return command.run(lambda: write_pictures(options.photographs, options.output))


def write_pictures(photographs: pathlib.Path, output: pathlib.Path) -> None:
    """Write all folders, whole or not at all.

    Raises:
        InputError: a photograph that is not there or is another one, by name; an output that exists.
    """
    refuse_existing(output)
    manifest = read_manifest()
    files = {photograph.name: _read(photograph, photographs) for photograph in manifest}
    bundled = {p.name: (_pixels(files[p.name]), p.caption) for p in manifest if p.bundled and p.split == "train"}
    examples = {p.name: (_middle(_pixels(files[p.name])), p.caption) for p in manifest if p.split == "example"}
    textures = _textures(bundled)
    with whole(output, 150_000_000) as target:
        for folder, split in (("train/photos", "train"), ("validation", "validation"), ("test", "test")):
            # As they are: JPEG once more would only add to what a restorer is to remove.
            chosen = [p for p in manifest if p.split == split and not p.bundled]
            (target / folder).mkdir(parents=True)
            for photograph in chosen:
                (target / folder / photograph.file).write_bytes(files[photograph.name])
                write_caption(target / folder / f"{photograph.name}.json", photograph.caption)
            print(f"{len(chosen)} photographs in {folder}")
        for folder, pictures in (("train/photos", textures), ("train/drawn", _drawn(textures)), ("example", examples)):
            (target / folder).mkdir(parents=True, exist_ok=True)
            for name, (pixels, caption) in pictures.items():
                Image.fromarray(pixels).save(target / folder / f"{name}.png")
                write_caption(target / folder / f"{name}.json", caption)
            print(f"{len(pictures)} pictures in {folder}")


Pictures = dict[str, tuple[np.ndarray, str]]
"""Name -> (H, W, 3) uint8 and the caption."""


def _read(photograph: Photograph, folder: pathlib.Path) -> bytes:
    """The file of a photograph, which is the manifest's."""
    bundle = pathlib.Path(skimage.data.__file__).parent
    path = (bundle if photograph.bundled else folder) / photograph.file
    if not path.is_file():
        how = "reinstall scikit-image" if photograph.bundled else "run gather_photographs.py"
        raise InputError(f"{path}: no such file; {how}")
    data = path.read_bytes()
    fault = photograph.fault(data)
    if fault:
        raise InputError(f"{path}: {fault}")
    return data


def _pixels(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def _textures(bundled: Pictures) -> Pictures:
    """Scikit-image's pictures for training: as they are, tinted, and of half the size."""
    tinted = {name: (_tinted(bundled[of.name][0], of.colours), of.caption) for name, of in TINTED.items()}
    pictures = bundled | tinted
    halved = {f"{name}_half": (_half(pictures[name][0]), pictures[name][1]) for name in HALVED}
    return {name: picture for name, picture in pictures.items() if name not in ONLY_HALVED} | halved


def _drawn(textures: Pictures) -> Pictures:
    pictures = {}
    names = "brick_red", "grass_green", "gravel_brown", "grass_dry", "ihc", "hubble_deep_field"
    cloths = [textures[name][0] for name in names]
    for kind, count in (("leaves", LEAVES), ("page", PAGES), ("chart", CHARTS)):
        for index in range(count):
            rng = np.random.default_rng((ord(kind[0]), index))
            pixels = leaves(rng, cloths) if kind == "leaves" else page(rng) if kind == "page" else chart(rng)
            pictures[f"{kind}_{index:02d}"] = (pixels, DRAWN[kind])
    return pictures


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The middle of a picture, with sides of at most 512 that a quarter and the network's levels divide."""
    height, width = (min(side, SIDE) // 16 * 16 for side in pixels.shape[:2])
    top, left = ((have - want) // 2 for have, want in zip(pixels.shape, (height, width), strict=False))
    return pixels[top : top + height, left : left + width]


def _tinted(pixels: np.ndarray, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Gray levels to colours between the given ones."""
    places = np.linspace(0, 255, len(colours))
    table = np.stack([np.interp(np.arange(256), places, channel) for channel in np.array(colours).T], axis=-1)
    return np.rint(table).astype(np.uint8)[pixels[..., 0]]


def _half(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.LANCZOS))


def leaves(rng: np.random.Generator, textures: list[np.ndarray]) -> np.ndarray:
    """Shapes that fall over each other, sizes by a power law: the edges and occlusions of photographs.

    Half of the shapes are plain or shaded, half show a part of a photographed texture in a colour of their own.
    Source: the dead leaves model (Lee, Mumford and Huang, IJCV 2001).
    """
    # Drawn at twice the size, so that edges are smooth.
    side = 2 * SIDE
    picture = _cloth(rng, textures, side)
    for _ in range(int(rng.integers(120, 400))):
        radius = min(side / 2, 10 * rng.pareto(1.2) + 8)
        centre = rng.uniform(0, side, 2)
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        if rng.random() < 0.6:
            angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        stretch = rng.uniform(0.35, 1.0)
        outline = radius * np.stack([np.cos(angles), stretch * np.sin(angles)], axis=-1)
        turn = rng.uniform(0, 2 * np.pi)
        outline = outline @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) + centre
        box = np.clip(np.stack([outline.min(0), outline.max(0) + 1]), 0, side).astype(int)
        (left, top), (right, bottom) = box
        if right <= left or bottom <= top:
            continue
        mask = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in outline.tolist()], fill=255)
        inside = np.asarray(mask) > 0
        cloth = _cloth(rng, textures, max(mask.size))[: bottom - top, : right - left]
        picture[top:bottom, left:right][inside] = cloth[inside]
    small = Image.fromarray(np.rint(picture).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _cloth(rng: np.random.Generator, textures: list[np.ndarray], side: int) -> np.ndarray:
    """(side, side, 3) float in 0..255: plain, shaded, striped, or a tinted part of a texture."""
    colour = _colour(rng)
    kind = rng.choice(["plain", "shaded", "stripes", "texture"], p=[0.15, 0.25, 0.1, 0.5])
    if kind == "plain":
        return np.broadcast_to(colour, (side, side, 3)).copy()
    ramp = np.linspace(-1, 1, side)
    turn = rng.uniform(0, 2 * np.pi)
    across = np.cos(turn) * ramp[None, :] + np.sin(turn) * ramp[:, None]
    if kind == "shaded":
        level = 1 + rng.uniform(0.1, 0.6) * across
    elif kind == "stripes":
        level = 1 + rng.uniform(0.1, 0.5) * np.sign(np.sin(across * side * np.pi / rng.uniform(10, 80)))
    else:
        texture = textures[int(rng.integers(len(textures)))]
        texture = np.rot90(texture, int(rng.integers(4)))
        tiles = [-(-side // length) + 1 for length in texture.shape[:2]]
        repeated = np.pad(
            texture, [(0, (n - 1) * m) for n, m in zip(tiles, texture.shape, strict=False)] + [(0, 0)], "reflect"
        )
        top, left = (int(rng.integers(length - side + 1)) for length in repeated.shape[:2])
        part = repeated[top : top + side, left : left + side].astype(np.float64)
        contrast = rng.uniform(0.3, 1.2)
        return np.clip(colour + contrast * (part - part.mean((0, 1))), 0, 255)
    return np.clip(colour * level[..., None], 0, 255)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Mostly muted, now and then pure: (3,) in 0..255."""
    gray = rng.uniform(15, 240)
    return np.clip(gray + rng.normal(0, rng.choice([4, 20, 50], p=[0.4, 0.4, 0.2]), 3), 0, 255)


def page(rng: np.random.Generator) -> np.ndarray:
    """Lines of words in Pillow's own font, in several sizes, dark on light or light on dark."""
    ground, ink = _colour(rng), _colour(rng)
    while abs(ground.mean() - ink.mean()) < 90:
        ground, ink = _colour(rng), _colour(rng)
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in ground))
    draw = ImageDraw.Draw(image)
    top = 8
    while top < SIDE:
        size = int(rng.choice([10, 12, 14, 18, 24, 36, 56]))
        words = " ".join(rng.choice(WORDS.split(), 16))
        draw.text(
            (int(rng.integers(4, 40)), top),
            words,
            fill=tuple(int(value) for value in ink),
            font=ImageFont.load_default(size),
        )
        top += int(1.35 * size)
    return np.asarray(image)


def chart(rng: np.random.Generator) -> np.ndarray:
    """Lines, circles, squares, a checkerboard and fine gratings, drawn at four times the size."""
    scale = 4
    image = Image.new("RGB", (scale * SIDE, scale * SIDE), tuple(int(value) for value in _colour(rng)))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        colour = tuple(int(value) for value in _colour(rng))
        x, y = (int(value) for value in rng.integers(0, scale * SIDE, 2))
        size, width = int(rng.integers(20, 500)), int(rng.integers(2, 24))
        kind = rng.choice(["line", "circle", "square", "grating", "checker"])
        if kind == "line":
            draw.line((x, y, *(int(value) for value in rng.integers(0, scale * SIDE, 2))), fill=colour, width=width)
        elif kind == "circle":
            draw.ellipse(
                (x, y, x + size, y + size), outline=colour, width=width, fill=colour if rng.random() < 0.4 else None
            )
        elif kind == "square":
            draw.rectangle(
                (x, y, x + size, y + size), outline=colour, width=width, fill=colour if rng.random() < 0.4 else None
            )
        else:
            step = int(rng.integers(10, 60))
            for row in range(8):
                for column in range(8 if kind == "checker" else 1):
                    if kind == "grating":
                        draw.rectangle((x + 2 * row * step, y, x + (2 * row + 1) * step - 1, y + size), fill=colour)
                    elif (row + column) % 2:
                        corner = x + column * step, y + row * step
                        draw.rectangle((*corner, corner[0] + step - 1, corner[1] + step - 1), fill=colour)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    sys.exit(main())
