"""`faithdiff ocr`: how many of the words in pictures of text can be read after restoring, as a table."""

import argparse
import sys

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import printable

DESCRIPTION = """Read the words in every method's pictures with PP-OCRv3 and compare them with those that are there:
precision, recall and F-score over all words of all pictures, as in table 3 of the paper."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    types.add_methods(parser, "a method and the folder of its results; once for each")
    add("--input", type=types.folder, metavar="DIR", help="the low-quality pictures, read as they are and enlarged")
    add(
        "--references",
        type=types.folder,
        metavar="DIR",
        help="the true pictures; the words that can be read in them are those that are there",
    )
    add("--annotations", type=types.path, metavar="FILE", help="a JSON file of the words that are there")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the table; pictures that cannot be read are listed at the end."""
    from faithdiff_jax.evaluation.comparison import compare
    from faithdiff_jax.evaluation.ocr import Counts, annotated_words, count_words
    from faithdiff_jax.files.reading import read_json

    if not (arguments.references or arguments.annotations):
        raise InputError("nothing says which words are there: give --references, or --annotations")
    annotations = None
    if arguments.annotations:
        annotations = annotated_words(read_json(arguments.annotations), arguments.annotations)
    methods = types.by_name(arguments.method)
    comparison = compare(methods, inputs=arguments.input, references=arguments.references, ending=arguments.ending)
    for line in comparison.missing:
        print(printable(line), file=sys.stderr)
    counts, faults = count_words(comparison, annotations)
    print("| | precision | recall | F-score | right | found | there |")
    print("|---|---|---|---|---|---|---|")
    for column, by_name in counts.items():
        total = sum(by_name.values(), Counts())
        shares = " | ".join(f"{100 * share:.1f} %" for share in (total.precision, total.recall, total.f_score))
        print(f"| {printable(column)} | {shares} | {total.right} | {total.found} | {total.wanted} |")
    return report_faults(faults, sum(map(len, comparison.files.values())), "pictures could not be read")
