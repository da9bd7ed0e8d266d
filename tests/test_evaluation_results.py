"""Folders of results, their tables and intervals."""

import contextlib
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.protocols import PROTOCOLS
from faithdiff_jax.evaluation.results import SETTINGS, Results, Row, check_name, read_rows
from faithdiff_jax.evaluation.statistics import mean_with_interval
from faithdiff_jax.evaluation.tables import Published, as_json, latex, markdown, summarise

PAPER = PROTOCOLS["paper"]


def filled(folder, figures, method="ours", set_name="set"):
    results = Results(folder, PAPER)
    results.add(method, {})
    for name, values in figures.items():
        results.rows(method)[set_name, name] = Row("in", "out", "ref", 0.25, dict(values), "a note, with a comma")
    results.save(method)
    return results


def test_rows_are_read_as_they_were_written(tmp_path):
    figures = {"a": {"psnr": 1 / 3, "ssim": 0.5}, 'b "quoted", é': {"psnr": 1e-300}}
    filled(tmp_path / "r", figures)
    again = Results(tmp_path / "r", PAPER)
    assert again.methods == ["ours"]
    rows = again.rows("ours")
    assert {name: row.figures for (_, name), row in rows.items()} == figures
    assert rows["set", "a"] == Row("in", "out", "ref", 0.25, figures["a"], "a note, with a comma")


def test_another_protocol_or_setting_is_refused(tmp_path):
    filled(tmp_path / "r", {"a": {"psnr": 1}})
    with pytest.raises(InputError, match=r"r: holds results of another protocol \(name 'paper', not 'ycbcr', psnr"):
        Results(tmp_path / "r", PROTOCOLS["ycbcr"])
    results = Results(tmp_path / "r", PAPER)
    with pytest.raises(InputError, match=r"ours was measured with steps None, now 3; give it another name"):
        results.add("ours", {"steps": 3})
    with pytest.raises(InputError, match="method Ours: ours is there already"):
        results.add("Ours", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(b"")
    with pytest.raises(InputError, match="other: holds other files than results"):
        Results(tmp_path / "other", PAPER)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "-x", "summary", "Table", "a.", "é" * 61, "a\n", "\0"]
)
def test_names_that_cannot_be_files_are_refused(name):
    with pytest.raises(InputError, match="must be 1 to 60 letters"):
        check_name(name, "method")


def test_damaged_rows_are_refused_with_their_line(tmp_path):
    filled(tmp_path / "r", {"a": {"psnr": 1}, "b": {"psnr": 2}})
    path = tmp_path / "r" / "ours.csv"
    good = path.read_text()
    lines = good.splitlines(keepends=True)
    damage = {
        lines[0] + lines[1] + "set,b,1\n": "line 3 (3 cells, not 8)",
        good.replace("2.0", "nan") if "2.0" in good else good.replace(",2,", ",nan,"): "line 3 ('nan' is not a number)",
        lines[0] + lines[1] * 2: "line 3 ('a' again)",
        good.replace("picture", "name"): "line 1 (another header)",
        "": "line 1 (another header)",
        lines[0] + lines[1] + '"set,b\n': "damaged at line 2",
        lines[0] + lines[1] + "x" * 200_000 + "\n": "field larger than field limit",
    }
    for text, message in damage.items():
        path.write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            Results(tmp_path / "r", PAPER).rows("ours")


TEXT = st.text(st.sampled_from('a,"\n\r\0set1.5-é{}[]:psnrnotes\t '), max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXT)
def test_nonsense_rows_are_read_or_refused(tmp_path, text):
    path = tmp_path / "ours.csv"
    path.write_text("set,picture,input,restored,reference,seconds,psnr,notes\n" + text, newline="")
    try:
        rows = read_rows(path)
    except InputError:
        return
    assert all(np.isfinite(list(row.figures.values())).all() for row in rows.values())


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "protocol", "methods", "peaks", "ours", "size"]),
    inner, max_size=4), max_leaves=12)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_nonsense_settings_are_refused(tmp_path, content):
    if not (tmp_path / "r").exists():
        filled(tmp_path / "r", {"a": {"psnr": 1}})
        (tmp_path / "stored.json").write_bytes((tmp_path / "r" / SETTINGS).read_bytes())
    path = tmp_path / "r" / SETTINGS
    stored = json.loads((tmp_path / "stored.json").read_text())
    for changed in (content, {**stored, **content} if isinstance(content, dict) else content):
        path.write_text(json.dumps(changed))
        with contextlib.suppress(InputError):
            Results(tmp_path / "r", PAPER)


def test_intervals_cover_and_are_seeded():
    values = np.random.default_rng(3).normal(20, 2, 50)
    mean = mean_with_interval(list(values))
    assert mean.mean == pytest.approx(values.mean())
    # Close to the normal one: 1.96 standard errors on either side.
    half = 1.96 * values.std() / np.sqrt(50)
    assert (mean.low, mean.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)
    assert mean_with_interval(list(values[::-1])) == mean
    assert mean_with_interval(list(values), seed=1) != mean
    assert mean_with_interval([]) is None
    single = mean_with_interval([2.0])
    assert (single.mean, single.low, single.count) == (2.0, None, 1)


@pytest.fixture
def summary(tmp_path):
    results = filled(tmp_path / "r", {"a": {"psnr": 20, "lpips": 0.25}, "b": {"psnr": 22, "lpips": 0.35}})
    results.add("rival_1", {})
    results.rows("rival_1")["set", "a"] = Row(figures={"psnr": 20.5, "lpips": 0.3})
    published = (
        from_dict(Published, {"set": "set", "method": "ours", "figures": {"psnr": 21.77}}, "x"),
        Published("set", "SUPIR", {"lpips": 0.4}),
    )
    reasons = {("", "", "niqe"): "no weights"}
    return summarise(results, ["psnr", "lpips", "niqe"], ["set"], reasons=reasons, published=published)


def test_published_figures_stand_beside_ours(summary):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(summary).splitlines() if "|" in line]
    assert rows[0] == ["set", "method", "pictures", "PSNR ↑", "LPIPS ↓", "NIQE ↓"]
    assert rows[2] == ["set", "ours", "2", "**21.00 [20.00, 22.00]**", "**0.3000 [0.2500, 0.3500]**", "-"]
    assert rows[3:6] == [
        ["set", "ours, published", "", "21.77", "-", "-"],
        ["set", "difference", "", "-0.77", "-", "-"],
        ["set", "rival_1", "1", "20.50", "**0.3000**", "-"],
    ]
    assert rows[6] == ["set", "SUPIR, published", "", "-", "0.4000", "-"]
    assert "- NIQE: no weights\n" in markdown(summary)


def test_latex_is_escaped_and_bold(summary):
    text = latex(summary)
    assert r"set & ours & \textbf{21.00} & \textbf{0.3000} & - \\" in text
    assert r" & rival\_1 & 20.50 & \textbf{0.3000} & - \\" in text
    assert text.count(r"\midrule") == 1


def test_the_record_has_reasons_for_what_is_missing(summary):
    record = as_json(summary)
    assert record["sets"]["set"]["ours"]["metrics"]["niqe"] == {"reason": "no weights"}
    assert record["sets"]["set"]["ours"]["metrics"]["psnr"]["count"] == 2
    json.dumps(record, allow_nan=False)
