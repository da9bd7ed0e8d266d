"""Words that can be read in restored pictures of text: precision and recall, as table 3 of the paper has them.

    picture --Reader (PP-OCRv3)--> words; words found, words wanted --score--> Counts --+--> Counts of a folder

A word that is found is right if it lies where one of the wanted words lies and says the same. The rule is that of the
ICDAR competitions' end-to-end recognition, by its published script: two boxes belong together if their intersection
over union is above 0.5, each to one other, the pair that overlaps most first; texts are compared without regard to case
and without the marks '!?.:,*"()·[]/ at either end. What lies in a region that is marked to be ignored by more than half
of its area counts neither way.

PP-OCRv3 reads lines, and Occluded RoadText is annotated by lines: a line is cut at its blanks into words, each as long
as its share of the letters.
"""

import functools
import hashlib
import importlib.metadata
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.comparison import REFERENCE, Comparison
from faithdiff_jax.evaluation.metrics.names import Unavailable

IOU = 0.5
"""Boxes that overlap by more belong together."""
IGNORED_SHARE = 0.5
"""A word is ignored if more of its area lies in a region to be ignored."""
PACKAGE, VERSION = "rapidocr-onnxruntime", "1.2.3"
MARKS = "'!?.:,*\"()·[]/"
_REMEMBERED = 4096  # pictures; a reference is read once for all methods

Picture = UInt8[np.ndarray, "_ _ 3"]
Corners = Float64[np.ndarray, "4 2"]


class Word(NamedTuple):
    """A word of a picture: its box as (x, y) in pixels, clockwise from where its text begins."""

    text: str
    corners: Corners
    ignored: bool = False


@dataclass(frozen=True)
class Counts:
    """Words that are there, words that were found, and how many of these are right."""

    wanted: int = 0
    found: int = 0
    right: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.wanted + other.wanted, self.found + other.found, self.right + other.right)

    @property
    def precision(self) -> float:
        """Right of those found; of none, 1 if there are none to find, otherwise 0."""
        return self.right / self.found if self.found else float(not self.wanted)

    @property
    def recall(self) -> float:
        """Right of those that are there; 1 if there are none."""
        return self.right / self.wanted if self.wanted else 1.0

    @property
    def f_score(self) -> float:
        """The harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def score(found: Sequence[Word], wanted: Sequence[Word]) -> Counts:
    """Compare the words that were read in a picture with those that are in it; the rule is above.

    Source: `E2E_iou_1_1.py` of the ICDAR Robust Reading Competition (rrc.cvc.uab.es), without word spotting; it takes
    pairs in the order of the annotation, where here the overlap decides.
    """
    ignored = [word for word in wanted if word.ignored]
    wanted = [word for word in wanted if not word.ignored and clean(word.text)]
    found = [
        word
        for word in found
        if clean(word.text)
        and not any(_overlap(word.corners, region.corners) > IGNORED_SHARE * _area(word.corners) for region in ignored)
    ]
    pairs = [
        (iou, ours, theirs)
        for ours, word in enumerate(found)
        for theirs, other in enumerate(wanted)
        if (iou := _iou(word.corners, other.corners)) > IOU
    ]
    right = 0
    free_ours, free_theirs = set(range(len(found))), set(range(len(wanted)))
    for _, ours, theirs in sorted(pairs, key=lambda pair: -pair[0]):
        if ours in free_ours and theirs in free_theirs:
            free_ours.remove(ours)
            free_theirs.remove(theirs)
            right += clean(found[ours].text) == clean(wanted[theirs].text)
    return Counts(len(wanted), len(found), right)


def clean(text: str) -> str:
    """A word as it is compared: in one case and one Unicode spelling, without marks at either end."""
    return unicodedata.normalize("NFKC", text).casefold().strip(MARKS)


def words_of_line(text: str, corners: Corners) -> list[Word]:
    """Cut a line at its blanks; every letter is taken to be as wide as the others."""
    words, at = [], 0
    for piece in text.split():
        start = text.index(piece, at)
        at = start + len(piece)
        ends = np.array([start, at, at, start])[:, None] / len(text)
        words.append(Word(piece, (1 - ends) * corners[[0, 0, 3, 3]] + ends * corners[[1, 1, 2, 2]]))
    return words


class Reader:
    """PP-OCRv3 with the settings it comes with; reads each picture once, however often it is asked.

    Raises:
        Unavailable: the package is not installed, or in another version, which holds other networks.
    """

    def __init__(self) -> None:
        self._engine = _engine()
        self._remembered: OrderedDict[bytes, tuple[Word, ...]] = OrderedDict()

    def __call__(self, picture: Picture) -> Sequence[Word]:
        """The words of (H, W, 3) uint8 RGB, in the order of its lines."""
        key = hashlib.sha256(str(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).digest()
        if key not in self._remembered:
            lines, _ = self._engine(np.ascontiguousarray(picture[..., ::-1]))
            words = [word for box, text, _ in lines or () for word in words_of_line(text, np.array(box, np.float64))]
            self._remembered[key] = tuple(words)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]


@functools.cache
def reader() -> Reader:
    """The reader that all metrics share."""
    return Reader()


def count_words(
    comparison: Comparison, annotations: Mapping[str, Sequence[Word]] | None = None
) -> tuple[dict[str, dict[str, Counts]], list[str]]:
    """Compare the words that are read in pictures with those that are there, by column and name.

    Args:
        comparison: methods, inputs and references. Words are scaled with their picture to the reference's size, or to
            the largest picture's.
        annotations: the words that are there, by name; None for those that are read in the references. Names that are
            not in it are left out.

    Returns:
        The counts, and a line for each picture that cannot be read.

    Raises:
        InputError: neither references nor annotations of any picture.
        Unavailable: as `Reader`.
    """
    read = reader()
    counts: dict[str, dict[str, Counts]] = {column: {} for column in comparison.columns}
    faults: list[str] = []
    for group in comparison.groups():
        faults += group.faults
        wanted = None if annotations is None else annotations.get(group.name)
        if annotations is None and REFERENCE in group.pictures:
            wanted = read(group.pictures[REFERENCE])
        if wanted is None:
            continue
        for column, picture in group.pictures.items():
            if column == REFERENCE and annotations is None:
                continue
            scale = np.array(group.size[::-1]) / picture.shape[1::-1]
            found = [word._replace(corners=word.corners * scale) for word in read(picture)]
            counts[column][group.name] = score(found, wanted)
    if not any(counts.values()):
        raise InputError("no picture has a reference or an annotation: names must be the same, without suffix")
    return {column: found for column, found in counts.items() if found}, faults


def metric(figure: str) -> Callable[[Sequence[Picture], Sequence[Picture]], list[float]]:
    """The measure of a metric: a figure of `Counts` for each picture, by the words that are read in its reference.

    Raises:
        Unavailable: as `Reader`.
    """
    read = reader()
    return lambda pictures, references: [
        float(getattr(score(read(picture), read(reference)), figure))
        for picture, reference in zip(pictures, references, strict=True)
    ]


def annotated_words(data: Any, name: object) -> Mapping[str, list[Word]]:
    """The words of each picture, of parsed JSON in the layout that the documentation shows.

    Args:
        data: `[{"image_id": "0001", "text": [{"vertices": [[x, y], ...], "transcription": "NO EXIT"}, ...]}, ...]`: a
            line or a word each with its four corners in pixels, clockwise from where the text begins. What has
            `"ignore": true` or no transcription is a region to be ignored.
        name: of the file, in messages.

    Returns:
        By `image_id`, the name of the picture without suffix.

    Raises:
        InputError: anything else; one line that says where.
    """
    if not isinstance(data, list) or not data:
        raise InputError(f"{name}: must be a list of pictures, each with image_id and text")
    pictures: dict[str, list[Word]] = {}
    for index, entry in enumerate(data):
        where = f"{name}: picture {index + 1}"
        image, texts = _field(entry, "image_id", str, where), _field(entry, "text", list, where)
        if not image or image in pictures:
            raise InputError(f"{where}: image_id {image[:60]!r} is {'there twice' if image else 'empty'}")
        pictures[image] = [
            word for number, text in enumerate(texts) for word in _annotated(text, f"{where}, text {number + 1}")
        ]
    return pictures


def _annotated(text: Any, where: str) -> list[Word]:
    corners = np.array(_vertices(_field(text, "vertices", list, where), where))
    ignore = text.get("ignore", False)
    transcription = text.get("transcription", "")
    if not _area(corners):
        raise InputError(f"{where}: vertices must enclose an area")
    if not isinstance(ignore, bool) or not isinstance(transcription, str):
        raise InputError(f"{where}: transcription must be text, ignore true or false")
    if ignore or not transcription.strip():
        return [Word(transcription, corners, True)]
    return words_of_line(transcription, corners)


def _vertices(points: list[Any], where: str) -> list[list[float]]:
    good = len(points) == 4 and all(isinstance(point, list) and len(point) == 2 for point in points)
    numbers = [value for point in points for value in point] if good else []
    if not good or not all(type(value) in (int, float) and abs(value) < 1e6 for value in numbers):
        raise InputError(f"{where}: vertices must be four points [x, y] in pixels")
    return [[float(x), float(y)] for x, y in points]


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise InputError(f"{where}: needs {key}, {'text' if kind is str else 'a list'}")
    return entry[key]


def _engine() -> Callable[[Picture], Any]:
    get = f'pip install "faithdiff-jax[ocr]", then pip install --no-deps {PACKAGE}=={VERSION}'
    try:
        version = importlib.metadata.version(PACKAGE)
        if version != VERSION:
            raise Unavailable(f"{PACKAGE} {version} reads by other networks than PP-OCRv3: {get}")
        from rapidocr_onnxruntime import RapidOCR
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{PACKAGE} is not installed: {get}") from None
    except ImportError as error:
        raise Unavailable(f"{PACKAGE} cannot be imported ({' '.join(str(error).split())}): {get}") from None
    engine: Callable[[Picture], Any] = RapidOCR()
    return engine


def _iou(one: Corners, other: Corners) -> float:
    both = _overlap(one, other)
    union = _area(one) + _area(other) - both
    return both / union if union > 0 else 0.0


def _overlap(one: Corners, other: Corners) -> float:
    """Area of the intersection of two boxes, in square pixels."""
    if not (_area(one) and _area(other)):
        return 0.0
    return float(cv2.intersectConvexConvex(_convex(one), _convex(other))[0])


def _area(corners: Corners) -> float:
    return float(cv2.contourArea(_convex(corners)))


def _convex(corners: Corners) -> np.ndarray:
    return cv2.convexHull(corners.astype(np.float32))
