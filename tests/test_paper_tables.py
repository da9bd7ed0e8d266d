"""The paper's tables, each by its one command, on a few small pictures that lie as the test sets do."""

import json
import pathlib
from xml.etree import ElementTree

import numpy as np
import pytest
from pictures import write
from PIL import Image
from skimage import data

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.evaluation.configuration import load_table
from faithdiff_jax.evaluation.metrics.names import METRICS

CONFIGS = pathlib.Path(__file__).parent.parent / "configs/evaluation"


def lay(place, one):
    """A set of two pictures with originals, or, where the paper has none, without."""
    side = one.crop or 48
    for name, photograph in (("0001", data.astronaut()), ("0002", data.coffee())):
        if one.folder.startswith("Real"):
            write(place / one.folder / f"{name}.png", np.ascontiguousarray(photograph[:side, : one.crop or 2 * side]))
        else:
            original = np.ascontiguousarray(photograph[100:148, 100:164])
            write(place / one.folder / "HR" / f"{name}.png", original)
            write(place / one.folder / "LR" / f"{name}.png", np.array(Image.fromarray(original).resize((16, 12))))


@pytest.mark.parametrize("table", sorted(path.stem for path in CONFIGS.iterdir()))
def test_one_command_prints_ours_beside_the_published_row(table, tmp_path, capsys):
    if table in ("table4", "table7"):  # of 1024x1024
        smaller = (CONFIGS / f"{table}.yaml").read_text().replace("crop: 256", "crop: 24")
        table = tmp_path / "smaller.yaml"
        table.write_text(smaller)
    config = load_table(str(table))
    for one in config.sets.values():
        lay(tmp_path / "data", one)
    model = SMALL_MODEL
    own = {changes["model"] for changes in config.methods.values() if "model" in changes}
    if own:  # each method a model of its own
        model = tmp_path / "models"
        model.mkdir()
        for name in own:
            (model / name).symlink_to(SMALL_MODEL)
    flags = ["--config", table, "--data", tmp_path / "data", "--model", model, "--output", tmp_path / "result"]
    steps = [] if table == "table10" else ["steps=1"]
    code = run_command("evaluate", [*map(str, flags), *steps])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "result/summary.json").read_text())
    assert code == 0, record["faults"]
    assert printed.startswith(f"# {config.title}\n")
    for set_name in config.sets:
        for method in config.methods:
            line = record["sets"][set_name][method]
            assert line["pictures"] == min(2, config.sets[set_name].limit or 2)
            for metric, figure in line["metrics"].items():
                info = METRICS.get(metric)
                compared = info is not None and info.needs_reference and config.sets[set_name].folder.startswith("Real")
                computed = not compared and (info is None or info.backend in ("numpy", "jax"))
                assert ("mean" in figure) == computed, (set_name, metric, figure)
                assert computed or figure["reason"]
    for one in config.published:
        row = next(row for row in printed.splitlines() if row.startswith(f"| {one.set} | {one.method}, published |"))
        for value in one.figures.values():
            assert f"{value:g}" in row
    assert printed.count("| difference |") == len(config.published)


def test_a_sweep_is_of_ones_own_set_and_drawn(tmp_path, capsys):
    config = load_table("table11")
    lay(tmp_path, next(iter(config.sets.values())))
    pairs = tmp_path / "DIV2K-Val/III"
    flags = ["--config", "table11", "--pairs", pairs, "--model", SMALL_MODEL, "--output", tmp_path / "result", "--plot"]
    assert run_command("evaluate", [*map(str, flags), "--metrics", "psnr", "steps=1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| III | {method} | 2 |" in printed for method in config.methods)
    drawn = (tmp_path / "result/plot.svg").read_text()
    texts = [each.text for each in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == list(config.methods)
    assert drawn.count("<circle") == len(config.methods)
    both = ["--config", "table11", "--data", tmp_path, *flags[2:]]
    assert run_command("evaluate", [*map(str, both)]) == 2
    assert "needs --data, the folder of its test sets, or --pairs" in capsys.readouterr().err
