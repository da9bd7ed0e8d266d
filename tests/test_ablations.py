"""The comparisons at a small size: what is kept, how its order is told, how it is printed and drawn."""

import csv
import pathlib
import re
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import load
from faithdiff_jax.evaluation.ablations import FIGURES, kept_table, kept_tables, keys_of, markdown, verdict
from faithdiff_jax.evaluation.configuration import load_table
from faithdiff_jax.evaluation.plots import of_comparison, svg
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.training.config import load_train_config
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import model_shapes
from faithdiff_jax.training.run_directory import model_config

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from ablation_rows import ROWS, Budget  # noqa: E402
from ablations import CONFIGS, arrays_of, rates_of, vector_of  # noqa: E402

PAGE = ROOT / "docs" / "ablations.md"


def figures(path, rows):
    """A file of figures: of each row a LPIPS for every seed and picture."""
    lines = ["row,seed,picture,psnr,lpips"]
    for name, seeds in rows.items():
        for seed, pictures in enumerate(seeds):
            lines += [f"{name},{seed},{number},20,{lpips}" for number, lpips in enumerate(pictures)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_order_counts_where_pictures_and_seeds_agree(tmp_path):
    rng = np.random.default_rng(0)
    full = rng.uniform(0.2, 0.4, (3, 10))
    rows = {
        "full": full,
        "without_alignment": full + rng.uniform(0.01, 0.03, (3, 10)),
        "without_pretraining": full - 0.02,
        "last_layer": full + np.array([[0.02], [0.02], [-0.001]]),  # one seed says otherwise
    }
    comparison = kept_table(5, figures(tmp_path / "figures.csv", rows))
    first, *others = comparison.lines
    assert [line.name for line in others] == list(keys_of(load_table("table5")))[1:]
    assert first.difference is None
    assert comparison.pictures == 10
    assert [verdict(line, first) for line in others] == ["as in the paper", "against the paper", "cannot be told"]
    wanted = (rows["without_alignment"] - full).mean()
    assert others[0].difference.mean == pytest.approx(wanted)
    assert others[0].by_seed == pytest.approx((rows["without_alignment"] - full).mean(1))
    printed = markdown(comparison)
    assert "| without aligner | 3 | 20.00 [20.00, 20.00] |" in printed
    assert "| 0.3199 | as in the paper |" in printed


def test_pictures_that_differ_tell_nothing(tmp_path):
    full = np.full((3, 6), 0.3)
    rows = {"full": full, "without_alignment": full + np.array([-0.04, 0.05, -0.03, 0.05, -0.05, 0.04])}
    comparison = kept_table(5, figures(tmp_path / "figures.csv", rows))
    assert verdict(comparison.lines[1], comparison.lines[0]) == "cannot be told"


@pytest.mark.parametrize("number", kept_tables())
def test_the_page_is_what_the_command_prints(number, capsys):
    assert run_command("evaluate", ["--table", str(number)]) == 0
    printed = capsys.readouterr().out
    table = printed.partition("\n\n")[2]
    found = re.search(f"<!-- faithdiff evaluate --table {number} -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found, f"python benchmarks/ablations.py WORK --only-evaluate --page docs: no mark of table {number}"
    assert found.group(1) == table, "the page is not what is kept: benchmarks/ablations.py --page docs"
    drawn = svg(*of_comparison(kept_table(number)))
    assert (ROOT / "docs" / f"ablations_{number}.svg").read_text() == drawn
    xml.etree.ElementTree.fromstring(drawn)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "1"], "table 1: no figures at the small size"),
        (["--table", "77"], "no table 'table77'"),
        (["--table", "5", "--output", "x"], "--table: prints figures that are kept, leave output out"),
        (["--table", "0"], "--table"),
        (["--baseline", "bicubic"], "--output: is missing"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command("evaluate", flags) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1]
    assert not list(tmp_path.iterdir())


def test_damaged_figures_are_one_line(tmp_path):
    path = tmp_path / "figures.csv"
    for text in (
        "row,seed\n",
        "row,seed,picture,psnr,lpips\nfull,x,a,1,2\n",
        "row,seed,picture,psnr,lpips\nfull,1,a,\n",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="figures"):
            kept_table(5, path)


@pytest.mark.parametrize("name", ["encoder_fixed", "last_layer"])
def test_a_row_trains_what_its_full_size_does(name):
    """The rates of a row's last stage are those of the configuration that it names; what that freezes has none."""
    row = ROWS[name]
    config = load_train_config(row.stages[-1][0], [*row.small, "data.sources=[{photos: none}]"])

    class Stored:
        config = load(FaithDiffConfig, CONFIGS / "tiny" / f"ablations_{row.base}.yaml")

    shapes = model_shapes(model_config(config, Stored))
    own = {path: shape for path, shape in shapes.items() if path.startswith(("alignment", "lq_encoder", "unet"))}
    rates = arrays_of(rates_of(config, shapes, Budget()), own)
    labels = assign_groups(config, shapes)
    for path, rate in rates.items():
        wanted = config.groups[labels[path]].learning_rate * Budget().faster if path in labels else 0
        np.testing.assert_allclose(rate, wanted, rtol=1e-5, err_msg=path)
    assert np.isclose(sum(share for _, share in row.stages), 1)


def test_a_vector_has_every_array_in_its_place():
    rng = np.random.default_rng(0)
    arrays = {"b.kernel": rng.standard_normal((2, 3)), "a.10.bias": rng.standard_normal(4), "a.9.bias": np.ones(1)}
    shapes = {path: array.shape for path, array in arrays.items()}
    found = arrays_of(vector_of(arrays, shapes), shapes)
    assert found.keys() == arrays.keys()
    for path in arrays:
        np.testing.assert_allclose(found[path], arrays[path], rtol=1e-6)


def test_what_is_kept_is_of_one_set_of_pictures_and_of_rows_that_are_there():
    rows = list(csv.reader(FIGURES.read_text().splitlines()))[1:]
    assert len(rows) < 2000
    assert len({row[2] for row in rows}) == 10
    models = {key for number in (5, 6, 8, 12) for key in keys_of(load_table(f"table{number}")).values()}
    assert models == ROWS.keys()
