"""A gallery of what was evaluated: the pictures of each set on a page, with the figures that are there already."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from faithdiff_jax.evaluation.comparison import compare
from faithdiff_jax.evaluation.gallery import GalleryOptions, write_gallery
from faithdiff_jax.evaluation.measured import Measured
from faithdiff_jax.evaluation.metrics.names import METRICS
from faithdiff_jax.evaluation.results import Results
from faithdiff_jax.evaluation.runner import Report
from faithdiff_jax.evaluation.testsets import TestSet


def write_galleries(sets: Sequence[TestSet], results: Results, report: Report, metrics: Sequence[str]) -> list[str]:
    """Write RESULT/gallery.html, or gallery-SET.html for each of several sets; what was there before is replaced.

    Args:
        sets: those that were evaluated.
        results: the figures, and where the pages go.
        report: of the run; it has the methods' files.
        metrics: names of those to show.

    Returns:
        A line for each picture that cannot be shown, and for each set without pictures.

    Raises:
        InputError: a page would be too large, or cannot be written.
    """
    faults = []
    infos = [METRICS[name] for name in metrics if name in METRICS and not METRICS[name].over_folders]
    titles = {name: METRICS[name].title for name in metrics if name in METRICS}
    for test_set in sets:
        methods = {method: files for (method, its), files in report.files.items() if its == test_set.name and files}
        inputs = {name: one.input for name, one in test_set.pictures.items() if one.input is not None}
        references = {name: one.reference for name, one in test_set.pictures.items() if one.reference is not None}
        if len(methods) + bool(inputs) + bool(references) < 2 or not methods:
            faults.append(f"{test_set.name}: no gallery, there is nothing to compare")
            continue
        figures = {
            method: {
                name: {titles[metric]: value for metric, value in row.figures.items() if metric in titles}
                for (its, name), row in results.rows(method).items()
                if its == test_set.name
            }
            for method in methods
        }
        page = "gallery.html" if len(sets) == 1 else f"gallery-{test_set.name}.html"
        comparison = compare(methods, inputs=_files(inputs), references=_files(references))
        options = GalleryOptions(title=test_set.name)
        faults += write_gallery(results.folder / page, comparison, Measured(infos, figures), options)
    return faults


def _files(files: Mapping[str, Path]) -> Mapping[str, Path] | None:
    return files or None
