"""Galleries: what the page holds, that nothing in a name gets out of its place, and that it is whole or not there."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from pictures import write
from PIL import Image

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation import gallery
from faithdiff_jax.evaluation.comparison import BICUBIC, INPUT, REFERENCE, compare
from faithdiff_jax.evaluation.gallery import GalleryOptions, write_gallery
from faithdiff_jax.evaluation.measured import Measured, measure
from faithdiff_jax.evaluation.metrics.names import METRICS

HOSTILE = [
    "<script>alert(1)<", "</script><b>", "quotes \" and ' & amp;", "<!-- <script>", "שלום עולם", "写真 é",
    "[[page]] [[title]]", "\u202egnp.exe",
]  # fmt: skip


class Page(HTMLParser):
    """The elements of a page as a browser's parser finds them, and the texts of its scripts by id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.blocks, self.heading, self._inside = [], {}, "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes = dict(attributes)
        self._inside = self.attributes.get("id", "") if tag in ("script", "style") else tag
        if tag == "meta" and self.attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = self.attributes["content"]

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside == "h1":
            self.heading += text
        elif self._inside is not None:
            self.blocks[self._inside] = self.blocks.get(self._inside, "") + text

    def data(self):
        return json.loads(self.blocks["page"])

    def sources(self, index):
        return json.loads(self.blocks[f"p{index}"])


def pixels(source):
    kind, data = source["src"].split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def noise(rng, height, width):
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path, rng):
    """Three pictures: input 12x16, results of two methods and the reference four times as large; "b" lacks one."""
    for name in ("one", "two", "three"):
        truth = noise(rng, 48, 64)
        write(tmp_path / "truth" / f"{name}.png", truth)
        write(tmp_path / "low" / f"{name}.png", truth[::4, ::4])
        write(tmp_path / "a" / f"{name}.png", truth // 2)
        if name != "two":
            write(tmp_path / "b" / f"{name}.webp", truth // 4)
    return tmp_path


def all_of(folders):
    methods = {"a": folders / "a", "b": folders / "b"}
    return compare(methods, inputs=folders / "low", references=folders / "truth")


def test_the_page_holds_every_pixel(folders):
    comparison = all_of(folders)
    assert comparison.columns == (INPUT, BICUBIC, "a", "b", REFERENCE)
    assert write_gallery(folders / "out.html", comparison) == []
    page = Page((folders / "out.html").read_text(encoding="utf-8"))
    data = page.data()
    assert [entry["name"] for entry in data["pictures"]] == ["one", "three", "two"]
    assert data["methods"] == list(comparison.columns)
    assert [data["methods"][data[side]] for side in ("left", "right")] == [BICUBIC, "b"]
    assert data["notes"] == ["b has no 'two'"]
    truth = np.asarray(Image.open(folders / "truth" / "three.png"))
    low, bicubic, a, _, reference = page.sources(1)
    np.testing.assert_array_equal(pixels(reference), truth)
    np.testing.assert_array_equal(pixels(a), truth // 2)
    np.testing.assert_array_equal(pixels(low), truth[::4, ::4])
    enlarged = Image.fromarray(truth[::4, ::4]).resize((64, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(bicubic), enlarged)
    assert page.sources(2)[3] is None
    assert (data["pictures"][0]["width"], data["pictures"][0]["height"]) == (64, 48)


def test_nothing_is_loaded_from_anywhere(folders):
    write_gallery(folders / "out.html", all_of(folders))
    text = (folders / "out.html").read_text(encoding="utf-8")
    assert not re.search(r"://|url\(|@import|\bfetch\b|XMLHttp|WebSocket", text)
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(Page(text).tags)
    assert Page(text).policy.startswith("default-src 'none'; img-src data:; script-src 'sha256-")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_in_their_place(tmp_path, rng, name):
    picture = write(tmp_path / "a.png", noise(rng, 8, 8))
    plain = Page(page_text(tmp_path, "plain", picture))
    page = Page(page_text(tmp_path, name, picture))
    assert page.tags == plain.tags
    printed = name.replace("\u202e", "\\u202e")
    data = page.data()
    assert data["pictures"][0]["name"] == printed
    assert data["methods"] == [printed, "other"]
    assert page.heading.strip() == printed


def page_text(folder, name, picture):
    comparison = compare({name: {name: picture}, "other": {name: picture}})
    write_gallery(folder / "out.html", comparison, options=GalleryOptions(title=name))
    return (folder / "out.html").read_text(encoding="utf-8")


def test_figures_are_those_of_the_metrics(folders):
    comparison = all_of(folders)
    measured = measure(comparison, ["psnr", "gmsd"])
    write_gallery(folders / "out.html", comparison, measured)
    data = Page((folders / "out.html").read_text(encoding="utf-8")).data()
    assert [metric["title"] for metric in data["metrics"]] == ["PSNR", "GMSD"]
    assert [metric["better"] for metric in data["metrics"]] == ["higher", "lower"]
    entry = data["pictures"][0]
    truth = np.asarray(Image.open(folders / "truth" / "one.png")).astype(float)
    expected = -10 * math.log10(np.mean((truth // 2 - truth) ** 2) / 255**2)
    assert entry["figures"][2][0] == pytest.approx(expected, abs=1e-4)
    assert entry["figures"][0] == entry["figures"][4] == [None, None]
    assert data["pictures"][2]["figures"][3] == [None, None]


def test_figures_that_json_lacks(folders):
    figures = {"a": {"one": {"PSNR": math.inf}, "two": {"PSNR": math.nan}, "three": {"PSNR": -math.inf}}}
    write_gallery(folders / "out.html", all_of(folders), Measured([METRICS["psnr"]], figures))
    entries = Page((folders / "out.html").read_text(encoding="utf-8")).data()["pictures"]
    assert [entry["figures"][2] for entry in entries] == [["Infinity"], ["-Infinity"], [None]]


def test_names_of_results_and_inputs_may_have_endings(folders):
    expected = [list(group.pictures.values()) for group in all_of(folders).groups()]
    for folder, ending in (("a", "_out"), ("b", "_RealESRGAN"), ("low", "_LR4")):
        for file in (folders / folder).iterdir():
            file.rename(file.with_stem(file.stem + ending))
    comparison = all_of(folders)
    assert comparison.names == ("one", "three", "two")
    assert comparison.missing == ["b has no 'two'"]
    found = [list(group.pictures.values()) for group in comparison.groups()]
    for these, those in zip(found, expected, strict=True):
        for ours, theirs in zip(these, those, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_names_in_doubt_are_refused_or_read_by_their_ending(folders, rng, capsys):
    for file in [*(folders / "a").iterdir()]:
        write(folders / "a" / f"{file.stem}_1.png", noise(rng, 48, 64))
        file.rename(file.with_stem(file.stem + "_2"))
    with pytest.raises(InputError, match=r"^a: names can be read in 2 ways .* --ending"):
        all_of(folders)
    flags = [f"--method=a={folders / 'a'}", f"--references={folders / 'truth'}", f"--output={folders / 'out.html'}"]
    assert run_command("gallery", [*flags, "--ending=_2"]) == 0
    err = capsys.readouterr().err
    assert "reference has no 'one_1', 'three_1', 'two_1'" in err
    page = Page((folders / "out.html").read_text(encoding="utf-8"))
    by_name = {entry["name"]: index for index, entry in enumerate(page.data()["pictures"])}
    halved = np.asarray(Image.open(folders / "truth" / "two.png")) // 2
    np.testing.assert_array_equal(pixels(page.sources(by_name["two"])[0]), halved)
    assert run_command("gallery", [*flags, "--ending=_3"]) == 2
    assert "no picture's name ends in it" in capsys.readouterr().err


def test_large_pictures_are_reduced_and_the_page_says_so(folders):
    write_gallery(folders / "out.html", all_of(folders), options=GalleryOptions(largest_side=32))
    page = Page((folders / "out.html").read_text(encoding="utf-8"))
    assert page.data()["pictures"][0]["size"] == "64 x 48, shown reduced to 32 x 24"
    assert pixels(page.sources(0)[2]).shape == (24, 32, 3)
    assert pixels(page.sources(0)[0]).shape == (12, 16, 3)


def test_pictures_beside_the_page(folders):
    write_gallery(folders / "out.html", all_of(folders), options=GalleryOptions(beside=True))
    page = Page((folders / "out.html").read_text(encoding="utf-8"))
    files = {source["src"] for index in range(3) for source in page.sources(index) if source}
    assert files == {f"out_pictures/{path.name}" for path in (folders / "out_pictures").iterdir()}
    assert len(files) == 14
    with pytest.raises(InputError, match=r"out_pictures: exists already"):
        write_gallery(folders / "out.html", all_of(folders), options=GalleryOptions(beside=True))


@pytest.mark.parametrize("beside", [False, True])
def test_the_page_is_written_whole_or_not_at_all(folders, monkeypatch, beside):
    (folders / "out.html").write_text("before")
    before = sorted(folders.rglob("*"))
    if beside:
        monkeypatch.setattr(gallery, "_json", lambda value: 1 / 0)
        expected = pytest.raises(ZeroDivisionError)
    else:
        monkeypatch.setattr(gallery, "EMBED_LIMIT", 50_000)
        expected = pytest.raises(InputError, match=r"larger than .* MB: put the pictures into a folder")
    with expected:
        write_gallery(folders / "out.html", all_of(folders), options=GalleryOptions(beside=beside))
    assert sorted(folders.rglob("*")) == before
    assert (folders / "out.html").read_text() == "before"


def test_pictures_that_cannot_be_read(folders, capsys):
    (folders / "a" / "one.png").write_bytes(b"nonsense")
    flags = [f"--method=a={folders / 'a'}", f"--method=b={folders / 'b'}", f"--output={folders / 'out.html'}"]
    assert run_command("gallery", flags) == 2
    out, err = capsys.readouterr()
    assert "3 pictures" in out
    assert "b has no 'two'" in err
    assert "1 of 5 pictures could not be read:" in err
    page = Page((folders / "out.html").read_text(encoding="utf-8"))
    assert page.sources(0)[0] is None
    assert any("one.png: not a picture" in note for note in page.data()["notes"])


def test_pictures_of_other_sizes_are_noted(folders, rng):
    write(folders / "a" / "one.png", noise(rng, 24, 30))
    comparison = all_of(folders)
    notes = next(comparison.groups()).notes
    assert notes == ["a has 30x24 pixels, shown at 64x48"]
    measured = measure(comparison, ["psnr"])
    assert measured.of("a", "one") == [None]
    assert measured.of("b", "one") != [None]
    assert len(measured.notes) == 1
    assert measured.notes[0].startswith("one, a: no PSNR: pictures of 30x24 and 64x48")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=a=a"], "a alone is nothing to compare"),
        (["--method=a=a", "--method=a=b"], "--method a: is given twice"),
        (["--method=a=a", "--method=A=b"], "in upper and lower case only"),
        (["--method=input=a", "--input=low"], "the name is taken by the input pictures"),
        (["--method=a", "--method=b=b"], "must be NAME=DIR"),
        (["--method=a=nowhere", "--method=b=b"], "nowhere: no such folder"),
        (["--method=a=a", "--method=b=empty"], "empty: no pictures in it"),
        (["--method=a=a", "--method=b=twice"], "have one name"),
        (["--method=a=a", "--method=b=b", "--metrics=psrn"], "did you mean psnr"),
        (["--method=a=a", "--method=b=b", "--protocol=nope"], "no protocol 'nope'"),
        (["--method=a=a", "--method=b=b", "--output=x.png"], "must end in .html"),
        (["--method=a=a", "--method=b=b", "--quality=101"], "from 1 to 100"),
        (["--method=a=a", "--method=b=b", "--largest-side=nan"], "must be a whole number"),
        (["--method=a=a", f"--method={'x' * 61}=b"], "must have 1 to 60 letters"),
    ],
)
def test_bad_input(folders, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folders)
    (folders / "empty").mkdir()
    (folders / "twice").mkdir()
    for suffix in ("png", "webp"):
        write(folders / "twice" / f"one.{suffix}", np.zeros((8, 8, 3), np.uint8))
    before = sorted(folders.rglob("*"))
    assert run_command("gallery", ["--output=out.html", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(folders.rglob("*")) == before
