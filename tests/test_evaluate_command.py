"""`faithdiff evaluate`: folders of any method and restorers into one table, kept, taken up, and never mixed up."""

import csv
import functools
import json
import shutil

import numpy as np
import pytest
from pictures import coordinates, write, write_caption
from PIL import Image
from skimage import data

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.baselines.restorer import Bicubic
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.evaluation.metrics import make_metric
from faithdiff_jax.evaluation.metrics.metric import Metric

evaluate = functools.partial(run_command, "evaluate")
NAMES = ("0801", "0802", "0803")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three originals of 64x48 in HR/, a quarter of the size in LR/, and a method's results in rival/."""
    noise = np.random.default_rng(0)
    for name, photograph in zip(NAMES, (data.astronaut(), data.coffee(), data.chelsea()), strict=True):
        original = np.ascontiguousarray(photograph[100:148, 100:164])
        write(tmp_path / "set/HR" / f"{name}.png", original)
        write(tmp_path / "set/LR" / f"{name}x4.png", np.array(Image.fromarray(original).resize((16, 12))))
        worse = np.clip(original + noise.normal(0, 8, original.shape), 0, 255).astype(np.uint8)
        write(tmp_path / "rival" / f"{name}_out.png", worse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Names of the metrics as they are computed, once for each picture."""
    calls = []
    many = Metric.many

    def counted(self, restored, references=None):
        figures = many(self, restored, references)
        calls.extend([self.name] * len(restored))
        return figures

    monkeypatch.setattr(Metric, "many", counted)
    return calls


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["set"], row["picture"]): row for row in csv.DictReader(file)}


def summary(result="result"):
    with open(f"{result}/summary.json", encoding="utf-8") as file:
        return json.load(file)


def rival(*more, result="result", metrics="psnr,gmsd"):
    flags = ["--restored", "rival", "--references", "set/HR", "--output", result, "--metrics", metrics]
    return evaluate([*flags, *more])


def test_figures_are_those_of_the_metrics(place, capsys):
    assert rival() == 0
    found = rows("result/rival.csv")
    assert [name for _, name in found] == list(NAMES)
    psnr = make_metric("psnr", "paper")
    for name in NAMES:
        pair = [np.asarray(Image.open(path)) for path in (f"rival/{name}_out.png", f"set/HR/{name}.png")]
        assert float(found["pictures", name]["psnr"]) == psnr(*pair)
    record = summary()
    mean = record["sets"]["pictures"]["rival"]["metrics"]["psnr"]
    assert mean["mean"] == pytest.approx(np.mean([float(row["psnr"]) for row in found.values()]))
    assert mean["low"] < mean["mean"] < mean["high"]
    assert record["protocol"]["psnr"] == "rgb"
    assert record["versions"]["numpy"] == np.__version__
    assert (place / "result/table.md").read_text() in capsys.readouterr().out
    assert r"\toprule" in (place / "result/table.tex").read_text()


def test_the_protocol_changes_the_figures(place):
    assert rival() == 0
    assert rival("--protocol", "ycbcr", result="other") == 0
    rgb, ycbcr = (summary(name)["sets"]["pictures"]["rival"]["metrics"]["psnr"]["mean"] for name in ("result", "other"))
    assert ycbcr - rgb > 1


def test_what_is_measured_is_not_measured_again(place, measured):
    assert rival() == 0
    assert sorted(measured) == ["gmsd"] * 3 + ["psnr"] * 3
    before = (place / "result/rival.csv").read_bytes()
    measured.clear()
    assert rival() == 0
    assert measured == []
    assert (place / "result/rival.csv").read_bytes() == before
    assert rival(metrics="psnr,ssim,gmsd") == 0
    assert measured == ["ssim"] * 3
    measured.clear()
    # Other bytes under the same name, of a result and of an original: both are told by content.
    write(place / "rival/0802_out.png", coordinates(48, 64))
    assert rival(metrics="psnr,ssim,gmsd") == 0
    assert sorted(measured) == ["gmsd", "psnr", "ssim"]
    measured.clear()
    write(place / "set/HR/0801.png", coordinates(48, 64))
    assert rival() == 0
    assert sorted(measured) == ["gmsd", "psnr"]


def test_an_interrupted_run_keeps_what_it_measured(place, monkeypatch, capsys):
    """Ctrl-C in the second batch."""
    monkeypatch.setattr("faithdiff_jax.evaluation.runner.PIXELS_AT_ONCE", 1)
    many, calls = Metric.many, []

    def interrupted(self, restored, references=None):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return many(self, restored, references)

    monkeypatch.setattr(Metric, "many", interrupted)
    assert rival() == 130
    kept = rows("result/rival.csv")
    assert kept["pictures", "0801"]["psnr"]
    assert rival() == 0
    assert len(calls) == 4 + 6 - 2
    assert rows("result/rival.csv")["pictures", "0801"] == kept["pictures", "0801"]


def test_methods_join_one_table(place, capsys):
    assert rival() == 0
    assert (
        evaluate(["--restored", "second=set/HR", "--references", "set/HR", "--output", "result", "--metrics", "psnr"])
        == 0
    )
    record = summary()
    assert list(record["sets"]["pictures"]) == ["rival", "second"]
    assert record["sets"]["pictures"]["second"]["metrics"]["psnr"]["mean"] == pytest.approx(80)
    assert "| pictures | second | 3 | **80.00" in capsys.readouterr().out


def test_a_baseline_restores_and_is_measured_and_taken_up(place, monkeypatch):
    flags = ["--baseline", "bicubic", "--pairs", "set", "--metrics", "psnr,seconds,memory", "--output", "result"]
    restored = []
    restore = Bicubic.restore
    monkeypatch.setattr(
        Bicubic, "restore", lambda self, low, caption: restored.append(1) or restore(self, low, caption)
    )
    assert evaluate(flags) == 0
    picture = np.asarray(Image.open("result/restored/bicubic/set/0802.png"))
    low = Image.open("set/LR/0802x4.png")
    np.testing.assert_array_equal(picture, np.asarray(low.resize((64, 48), Image.Resampling.BICUBIC)))
    figures = summary()["sets"]["set"]["bicubic"]["metrics"]
    assert figures["seconds"]["count"] == 2  # the first one's program would be compiled
    assert figures["memory"]["mean"] > 50
    assert evaluate(flags) == 0
    assert len(restored) == 3
    # A result that was changed, or an input that was, is restored again; the others are not.
    write(place / "result/restored/bicubic/set/0801.png", coordinates(48, 64))
    write(place / "set/LR/0803x4.png", coordinates(12, 16))
    assert evaluate(flags) == 0
    assert len(restored) == 5
    assert evaluate([*flags, "--scale", "2"]) == 2  # other pictures, whose size is not the references'
    assert len(restored) == 8


def test_the_model_restores_with_its_options(place, monkeypatch, capsys):
    """What `FaithDiff.restore` makes of them, other tests see."""
    calls = []

    def restore(self, image, caption, options):
        calls.append((caption, options))
        return Bicubic(options.scale).restore(image)

    monkeypatch.setattr(FaithDiff, "restore", restore)
    write_caption(place / "set/Caption/0802x4.json", "The image features a cup of coffee. It is hot. It is full.")
    flags = ["--model", str(SMALL_MODEL), "--pairs", "set", "--metrics", "psnr", "--output", "result"]
    assert evaluate([*flags, "steps=1"]) == 0
    assert [caption for caption, _ in calls] == ["", "A cup of coffee. It is hot.", ""]
    options = calls[0][1]
    assert (options.steps, options.scale, options.color_fix) == (1, 4, "wavelet")  # the last is the model's default
    assert summary()["methods"]["FaithDiff"]["steps"] == 1
    capsys.readouterr()
    assert evaluate([*flags, "steps=2"]) == 2
    assert capsys.readouterr().err == (
        "error: result: FaithDiff was measured with steps 1, now 2; give it another name or --output\n"
    )
    for wrong, message in (("step=2", "unknown key step"), ("steps=0", "steps is 0"), ("scale=2", "give --scale")):
        assert evaluate([*flags, wrong]) == 2
        assert message in capsys.readouterr().err
    assert len(calls) == 3


def test_without_references_only_what_needs_none_is_measured(place):
    assert evaluate(["--restored", "rival", "--metrics", "psnr", "--output", "result"]) == 0
    record = summary()["sets"]["pictures"]["rival"]
    assert record == {"pictures": 3, "metrics": {"psnr": {"reason": "no reference"}}}


def faults(capsys):
    return capsys.readouterr().err.splitlines()


def test_mismatches_are_all_listed(place, capsys):
    write(place / "rival/grid_out.png", coordinates(48, 64))
    (place / "rival/0801_out.png").unlink()
    assert rival() == 2
    assert faults(capsys) == [
        "2 of 2 pictures have faults:",
        "  rival, pictures: rival/grid_out.png: no picture of that name in set/HR",
        "  rival, pictures: set/HR/0801.png: no picture of that name in rival",
    ]
    assert len(rows("result/rival.csv")) == 2


def test_bad_pictures_have_empty_cells_and_reasons(place, capsys):
    write(place / "rival/0801_out.png", coordinates(40, 64))
    (place / "rival/0802_out.png").write_bytes((place / "rival/0802_out.png").read_bytes()[:300])
    assert rival() == 2
    lines = faults(capsys)
    assert len(lines) == 3
    assert "rival/0801_out.png: no psnr, gmsd: pictures of 64x40 and 64x48 pixels cannot be compared" in "".join(lines)
    assert "rival/0802_out.png: damaged" in "".join(lines)
    assert summary()["sets"]["pictures"]["rival"]["metrics"]["psnr"]["count"] == 1
    assert rows("result/rival.csv")["pictures", "0801"]["psnr"] == ""
    assert "cannot be compared" in rows("result/rival.csv")["pictures", "0801"]["notes"]


def test_grey_and_alpha_are_measured_and_noted(place):
    grey = Image.open("rival/0801_out.png").convert("L")
    grey.save("rival/0801_out.png")
    with Image.open("rival/0802_out.png") as picture:
        picture.putalpha(100)
        picture.save("rival/0802_out.png")
    assert rival() == 0
    found = rows("result/rival.csv")
    assert found["pictures", "0801"]["notes"] == "gray repeated into three channels"
    assert found["pictures", "0802"]["notes"] == "alpha kept apart"
    assert all(row["psnr"] for row in found.values())


def test_pictures_too_small_for_a_window(place, capsys):
    for name in NAMES:
        write(place / "set/HR" / f"{name}.png", coordinates(10, 10))
        write(place / "rival" / f"{name}_out.png", coordinates(10, 10))
    assert rival() == 2
    assert "no gmsd: pictures of 10x10 pixels are too small" in faults(capsys)[1]
    cells = summary()["sets"]["pictures"]["rival"]["metrics"]
    assert cells["psnr"]["count"] == 3
    assert "too small" in cells["gmsd"]["reason"]


def test_an_unavailable_metric_is_an_empty_cell(place, monkeypatch, capsys):
    from faithdiff_jax.evaluation.metrics import Unavailable, metric

    def missing(protocol):
        raise Unavailable("ssim: no weights, pip install them")

    monkeypatch.setitem(metric._MAKERS, "ssim", missing)
    assert rival(metrics="ssim,psnr") == 0
    assert "- SSIM: ssim: no weights, pip install them" in capsys.readouterr().out
    assert summary()["sets"]["pictures"]["rival"]["metrics"]["psnr"]["count"] == 3


def test_an_empty_folder_leaves_the_others(place, capsys):
    (place / "empty").mkdir()
    assert rival("--restored", "empty") == 2
    assert faults(capsys)[1] == "  empty, pictures: empty: holds no pictures"
    cells = summary()["sets"]["pictures"]
    assert cells["empty"]["metrics"]["psnr"] == {"reason": "empty: holds no pictures"}
    assert cells["rival"]["metrics"]["psnr"]["count"] == 3


def test_results_of_another_protocol_and_damaged_ones_are_refused(place, capsys):
    assert rival() == 0
    before = {path: path.read_bytes() for path in place.glob("result/*")}
    capsys.readouterr()
    assert rival("--protocol", "ycbcr") == 2
    assert faults(capsys)[0].startswith("error: result: holds results of another protocol")
    assert {path: path.read_bytes() for path in place.glob("result/*")} == before
    (place / "result/rival.csv").write_text("set;picture\n")
    assert rival() == 2
    assert "rival.csv: damaged at line 1 (another header); delete it to measure again" in faults(capsys)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no method: give --restored, --model or --baseline"),
        (["--restored", "nowhere"], "--restored nowhere: no such folder"),
        (["--restored", "x=" + "y" * 5000], "no such folder"),
        (["--restored", ""], "must not be empty"),
        (["--restored", "rival/0801_out.png"], "is a file"),
        (["--restored", "a/b=rival"], "method 'a/b': must be 1 to 60 letters"),
        (["--restored", "x=rival", "--restored", "X=rival"], "method x: is given twice"),
        (["--restored", "rival", "--metrics", "psnr,lpisp"], "no metric 'lpisp'; did you mean lpips?"),
        (["--restored", "rival", "--protocol", "papre"], "no protocol 'papre'; did you mean paper?"),
        (["--restored", "rival", "--references", "empty"], "empty: holds no pictures"),
        (["--restored", "rival", "--references", "set/HR", "--pairs", "set"], "give one of them"),
        (
            ["--restored", "rival", "--references", "set/HR", "--ending", "_x"],
            "ending '_x': no picture's name ends in it",
        ),
        (["--baseline", "bicubic"], "need low-quality pictures to restore"),
        (["--baseline", "lanczos", "--pairs", "set"], "--baseline lanczos: must be bicubic, or NAME=DIR"),
        (["--baseline", "bicubic", "--pairs", "set", "--scale", "nan"], "--scale nan: must be above 0"),
        (["--baseline", "bicubic", "--pairs", "empty"], "empty: holds no pictures"),
        (["--model", "empty", "--pairs", "set"], "empty"),
        (["--model", str(SMALL_MODEL), "--pairs", "set", "--preset", "swift"], "unknown preset 'swift' of this model"),
        (["--restored", "rival", "--preset", "swift"], "--preset swift: is one of --model"),
        (["--restored", "rival", "steps=3"], "options are the model's"),
        (["--restored", "rival", "--config", "table1"], "--config: needs --data"),
        (["--restored", "rival", "--data", "set"], "--data: is for --config"),
        (["--restored", "rival", "--config", "tabel1", "--data", "set"], "no table 'tabel1'; did you mean table1"),
        (["--restored", "rival", "--output", "rival"], "rival: holds other files than results"),
    ],
)
def test_wrong_flags_end_in_one_line(place, capsys, flags, message):
    (place / "empty").mkdir()
    before = sorted(place.rglob("*"))
    output = [] if "--output" in flags else ["--output", "result"]
    assert evaluate([*flags, *output]) == 2
    lines = faults(capsys)
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(place.rglob("*")) == before


def test_several_sets_take_a_folder_each(place):
    shutil.copytree("set", "other")
    for name in ("set", "other"):
        shutil.copytree("rival", f"theirs/{name}")
    flags = ["--restored", "theirs", "--pairs", "set", "--pairs", "other", "--output", "result", "--metrics", "psnr"]
    assert evaluate(flags) == 0
    assert list(summary()["sets"]) == ["set", "other"]
    assert len(rows("result/theirs.csv")) == 6


def test_tables_are_of_the_pictures_that_are_there_now(place):
    """What was measured before stays in the file; a table does not mix it in."""
    assert (
        evaluate(["--restored", "second=set/HR", "--references", "set/HR", "--output", "result", "--metrics", "psnr"])
        == 0
    )
    for path in ("rival/0801_out.png", "set/HR/0801.png"):
        (place / path).unlink()
    assert rival(metrics="psnr") == 0
    write(place / "set/HR/0803.png", coordinates(48, 64))
    assert rival(metrics="psnr") == 0
    counts = {name: its["pictures"] for name, its in summary()["sets"]["pictures"].items()}
    assert counts == {"second": 1, "rival": 2}
    assert len(rows("result/second.csv")) == 3


def test_folder_metrics_see_exactly_the_matched_pictures(place, monkeypatch):
    """A stand-in for FID, whose weights are not here: the mean of all restored over that of all originals."""
    from faithdiff_jax.evaluation import measuring

    calls = []

    def means(restored, references):
        calls.append([len(list(folder.iterdir())) for folder in (restored, references)])
        ours, theirs = (
            np.mean([np.asarray(Image.open(path)).mean() for path in f.iterdir()]) for f in (restored, references)
        )
        return float(ours / theirs)

    monkeypatch.setattr(measuring, "make_folder_metric", lambda name: means)
    write(place / "set/HR/0899.png", coordinates(48, 64))
    assert rival(metrics="fid,psnr") == 2
    assert calls == [[3, 3]]
    cell = summary()["sets"]["pictures"]["rival"]["metrics"]["fid"]
    assert cell["mean"] == pytest.approx(1, abs=0.05)
    assert (cell["low"], cell["count"]) == (None, 3)
    assert rival(metrics="fid,psnr") == 2
    assert len(calls) == 1
    write(place / "rival/0802_out.png", coordinates(48, 64))
    assert rival(metrics="fid,psnr") == 2
    assert len(calls) == 2


def test_a_gallery_of_what_was_measured(place):
    """Its figures are those of the table: nothing is measured for it."""
    flags = ["--baseline", "bicubic", "--restored", "rival", "--pairs", "set", "--metrics", "psnr,seconds"]
    assert evaluate([*flags, "--output", "result", "--gallery"]) == 0
    page = (place / "result/gallery.html").read_text(encoding="utf-8")
    assert "rival" in page
    assert all(name in page for name in NAMES)
    psnr = float(rows("result/rival.csv")["set", "0802"]["psnr"])
    assert str(psnr)[:7] in page
    shutil.copytree("set", "other")
    assert evaluate(["--baseline", "bicubic", "--pairs", "set", "--pairs", "other", "--output", "r2", "--gallery"]) == 2
    assert (place / "r2/gallery-other.html").is_file()
