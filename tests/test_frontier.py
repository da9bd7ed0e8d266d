"""The benchmark of what a second buys: its settings are options there are, its counts and its plot are right."""

import dataclasses
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from converted import loaded

from faithdiff_jax import FaithDiffConfig, RestoreOptions
from faithdiff_jax.inference.evaluations import Evaluation

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
frontier = pytest.importorskip("frontier")
full_size_options = pytest.importorskip("full_size_options")


def test_settings_are_options_that_the_published_model_takes():
    for changes in frontier.SETTINGS.values():
        RestoreOptions(**changes).check_against(FaithDiffConfig())


def test_what_evaluations_cost():
    config = loaded().config
    cost = lambda levels=0, **kind: frontier.evaluation_flops(config, 8, Evaluation(**kind), levels)  # noqa: E731
    guided, plain = cost(guided=True), cost(guided=False)
    assert plain < guided < 2 * plain  # both sides share the aligner
    assert cost(1, guided=True, shallow=True) < cost(2, guided=True, shallow=True) < guided
    assert cost(1, guided=True) == guided
    assert cost(guided=False, frozen=True) < plain


def test_times_at_full_size_are_those_of_each_evaluation():
    model = loaded()
    options = RestoreOptions(steps=4, guidance=5.0, deepcache_interval=2, guidance_end=0.5)
    kinds = full_size_options.kinds(options)
    guided, plain = Evaluation(guided=True), Evaluation(guided=False)
    shallow = [dataclasses.replace(each, shallow=True) for each in (guided, plain)]
    assert kinds == [(guided, 0), (shallow[0], 1), (plain, 0), (shallow[1], 1)]
    times = full_size_options.Times(model.config, 8, 1, {part: model.params[part] for part in ("unet", "alignment")})
    seconds, flops = times.of(kinds[1])
    assert seconds > 0
    assert flops == frontier.evaluation_flops(model.config, 8, shallow[0], 1)
    assert times.of(kinds[1]) is times.of(kinds[1])


def test_the_plot_can_be_drawn(tmp_path):
    row = frontier.Row(frontier.REFERENCE, 40, 1.0, 80.0, 0.0, 25.0, 0.3, 1.0)
    rows = [row, *(dataclasses.replace(row, name=f"a < {i}", time=i / 4, psnr=20.0 + i) for i in range(1, 4))]
    frontier.plot(rows, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert len([node for node in drawn.iter() if node.tag.endswith("circle")]) == 3
    assert str(row).startswith("| euler, 20 steps | 40 | 1.00 |  |  | 25.00 |")
