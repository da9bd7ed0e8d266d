"""Write the photographs that the small model is trained on, and those held out to judge it, each with a caption.

    python examples/tiny/training_photos.py --output photos

    photos/train/photos/   photographs and tinted textures
    photos/train/drawn/    pictures that are drawn: leaves, pages of text, charts
    photos/held_out/       chelsea, coffee and camera: no part of them is under train/

All photographs are bundled with scikit-image (`pip install 'faithdiff-jax[examples]'`); nothing is downloaded. Their
sources and licences are in README.md beside this file. The same pictures come out on every run.
"""

import argparse
import dataclasses
import pathlib
import sys

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import write_caption
from faithdiff_jax.files.writing import refuse_existing, whole

SIDE = 512
LEAVES, PAGES, CHARTS = 24, 6, 6


@dataclasses.dataclass(frozen=True)
class Photo:
    """A picture of scikit-image's, by its file's name, and what is seen on it."""

    file: str
    caption: str
    tint: tuple[tuple[int, int, int], ...] = ()
    """RGB colours for gray pictures, from black to white; () leaves gray as it is."""
    halve: bool = False
    """Whether a copy of half the size is written as well: the same things, smaller and sharper."""
    only_half: bool = False


TRAIN = {
    "astronaut": Photo(
        "astronaut.png",
        "The image features a smiling woman in an orange space suit. A flag and a model shuttle are behind her.",
        halve=True,
    ),
    "rocket": Photo(
        "rocket.jpg",
        "The image features a rocket that rises from its launch pad at dusk. Flames and smoke light up the ground.",
        halve=True,
    ),
    "retina": Photo(
        "retina.jpg",
        "The image features the inside of an eye with fine red vessels. A bright disc lies on one side of it.",
        only_half=True,
    ),
    "galaxies": Photo(
        "hubble_deep_field.jpg",
        "The image features many small galaxies on a black sky. They are of many colours, shapes and sizes.",
        halve=True,
    ),
    "tissue": Photo(
        "ihc.png",
        "The image features stained tissue under a microscope. Brown rings and small blue cells fill the picture.",
        halve=True,
    ),
    "brick": Photo(
        "brick.png",
        "The image features a brick wall with narrow joints. The bricks are red and rough.",
        tint=((40, 18, 14), (176, 82, 58), (250, 222, 204)),
    ),
    "brick_gray": Photo("brick.png", "The image features a gray brick wall with narrow joints."),
    "grass": Photo(
        "grass.png",
        "The image features a dense lawn of green grass. Its blades point in all directions.",
        tint=((8, 22, 6), (92, 132, 46), (240, 246, 188)),
    ),
    "hay": Photo(
        "grass.png",
        "The image features dry grass and weeds. The blades are brown and point in all directions.",
        tint=((22, 12, 8), (150, 108, 66), (252, 236, 206)),
        halve=True,
    ),
    "gravel": Photo(
        "gravel.png",
        "The image features gravel of many small stones. The stones are brown and gray.",
        tint=((24, 20, 22), (138, 122, 104), (246, 242, 232)),
    ),
    "gravel_gray": Photo("gravel.png", "The image features gravel of many small gray stones.", halve=True),
    "coins": Photo(
        "coins.png", "The image features rows of old coins on a dark cloth. Heads are stamped on the coins."
    ),
    "cell": Photo("cell.png", "The image features a single round cell under a microscope. Its rim is bright."),
}
HELD_OUT = {
    "chelsea": Photo(
        "chelsea.png", "The image features a close-up of a tabby cat. Its green eyes look to the side."
    ),
    "coffee": Photo(
        "coffee.png",
        "The image features a cup of coffee on a saucer. A small spoon lies beside it on a wooden table.",
    ),
    "camera": Photo(
        "camera.png", "The image features a man in a dark coat with a camera on a tripod. Towers are behind him."
    ),
}  # fmt: skip
DRAWN = {
    "leaves": "The image features overlapping round and angular shapes of many colours.",
    "page": "The image features a page of printed text. The letters are of several sizes.",
    "chart": "The image features drawn lines, circles and squares on a plain ground.",
}
CAPTIONS = [*(photo.caption for photo in (*TRAIN.values(), *HELD_OUT.values())), *DRAWN.values()]
WORDS = """
    light water stone river morning window paper garden letter number small large under over between before after
    often never always quick slow bright dark north south west east one two three four five six seven eight nine
    of and the to in a is that it was for on are with as at be this have from or by not but what all were when
"""


def main(argv: list[str] | None = None) -> int:
    """Write the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a folder that does not exist yet")
    try:
        counts = write_pictures(parser.parse_args(argv).output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} pictures in {folder}" for folder, count in counts.items()))
    return 0


def write_pictures(output: pathlib.Path) -> dict[str, int]:
    """Write both folders, whole or not at all; returns how many pictures each got."""
    refuse_existing(output)
    counts = {}
    with whole(output, 60_000_000) as target:
        photos = _photos()
        folders = {"train/photos": photos, "train/drawn": _drawn(photos), "held_out": _held_out()}
        for folder, pictures in folders.items():
            (target / folder).mkdir(parents=True)
            for name, (pixels, caption) in pictures.items():
                Image.fromarray(pixels).save(target / folder / f"{name}.png")
                write_caption(target / folder / f"{name}.json", caption)
            counts[folder] = len(pictures)
    return counts


Pictures = dict[str, tuple[np.ndarray, str]]
"""Name -> (H, W, 3) uint8 and the caption."""


def _photos() -> Pictures:
    pictures = {}
    for name, photo in TRAIN.items():
        pixels = _tinted(read_photo(photo.file), photo.tint)
        if not photo.only_half:
            pictures[name] = (pixels, photo.caption)
        if photo.halve or photo.only_half:
            pictures[f"{name}_half"] = (_half(pixels), photo.caption)
    return pictures


def _drawn(photos: Pictures) -> Pictures:
    pictures = {}
    textures = [photos[name][0] for name in ("brick", "grass", "gravel", "hay", "tissue", "galaxies")]
    for kind, count in (("leaves", LEAVES), ("page", PAGES), ("chart", CHARTS)):
        for index in range(count):
            rng = np.random.default_rng((ord(kind[0]), index))
            pixels = leaves(rng, textures) if kind == "leaves" else page(rng) if kind == "page" else chart(rng)
            pictures[f"{kind}_{index:02d}"] = (pixels, DRAWN[kind])
    return pictures


def _held_out() -> Pictures:
    """The middle of each, with sides of at most 512 that a quarter and the network's levels divide."""
    pictures = {}
    for name, photo in HELD_OUT.items():
        pixels = read_photo(photo.file)
        height, width = (min(side, SIDE) // 16 * 16 for side in pixels.shape[:2])
        top, left = ((have - want) // 2 for have, want in zip(pixels.shape, (height, width), strict=False))
        pictures[name] = (pixels[top : top + height, left : left + width], photo.caption)
    return pictures


def read_photo(file: str) -> np.ndarray:
    """A picture of scikit-image's bundle: (H, W, 3) uint8."""
    path = pathlib.Path(skimage.data.__file__).parent / file
    if not path.is_file():
        raise InputError(f"{path}: scikit-image bundles this picture, this installation lacks it; reinstall it")
    return np.asarray(Image.open(path).convert("RGB"))


def _tinted(pixels: np.ndarray, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Gray levels to colours between the given ones."""
    if not colours:
        return pixels
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
