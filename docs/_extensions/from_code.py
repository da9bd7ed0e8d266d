"""What the pages take from the code when they are built, so that it cannot go stale.

    ```{room} inference      the public names of every module of a room, from their docstrings
    ```{command} restore     what `faithdiff restore --help` prints
    ```{options}             every field of RestoreOptions: default, range, meaning

Docstrings are plain text with names in backticks: what reStructuredText would read as markup in them is escaped.
"""

import dataclasses
import importlib
import os
import pathlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from faithdiff_jax.cli.main import COMMANDS

Written = tuple[str | None, str | None]
PACKAGE = pathlib.Path(__file__).parents[2] / "faithdiff_jax"
MARKUP = re.compile(r"`([^`]+)`|([*|\\`]|_(?!\w))")


class Room(SphinxDirective):
    """A section for each module of a room; without a name, the modules that belong to no room."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The sections, each an `automodule`."""
        room = self.arguments[0] if self.arguments else ""
        files = (PACKAGE / room).rglob("*.py") if room else PACKAGE.glob("*.py")
        text = "".join(_section(path) for path in sorted(files) if not path.name.startswith("_"))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _section(path: pathlib.Path) -> str:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    name = module.removeprefix("faithdiff_jax.")
    return f"## `{name}`\n\n````{{eval-rst}}\n.. automodule:: {module}\n````\n\n"


class Command(SphinxDirective):
    """The help of a command, as it is printed on a terminal of 82 columns, which a page has room for."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A block of plain text."""
        name = self.arguments[0]
        parser = importlib.import_module(COMMANDS[name].module).build_parser()
        parser.prog = f"faithdiff {name}"
        columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "82"
        text = parser.format_help()
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
        return [nodes.literal_block(text, text, language="text")]


class Options(SphinxDirective):
    """A table of the fields of `RestoreOptions`."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        from faithdiff_jax import RestoreOptions

        lines = ["| option | default | range | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(RestoreOptions):
            about = field.metadata["about"]
            default = "none" if field.default is None else repr(field.default)
            lines.append(f"| `{field.name}` | `{default}` | {about.range} | {about.help} |")
        return self.parse_text_to_nodes("\n".join(lines))


def plain(app: Sphinx, what: str, name: str, target: object, options: object, lines: list[str]) -> None:
    """Escape markup in a docstring, and keep the line breaks of its data-flow lines."""
    lines[:] = "\n\n".join(map(_paragraph, re.split(r"\n{2,}", "\n".join(lines)))).split("\n")
    if what in ("attribute", "data"):
        lines.insert(0, "\\ ")  # vanishes; napoleon takes what the first line has before a colon for a type


def _paragraph(paragraph: str) -> str:
    rows = [row for row in paragraph.split("\n") if row]
    flow = len(rows) > 1 and all("->" in row for row in rows)
    if flow or not rows or all(row.startswith("    ") for row in rows):
        return "::\n\n" + "\n".join(f"    {row}" for row in rows) if rows else ""
    # A literal may have letters on either side, as in "`Loader`s": the escaped blanks vanish.
    return MARKUP.sub(lambda match: f"\\ ``{match[1]}``\\ " if match[1] else f"\\{match[2]}", paragraph)


def short_types(app: Sphinx, what: str, name: str, target: object, options: object, *written: str | None) -> Written:
    """Name arrays in a signature as the source does."""
    signature, returned = (text and re.sub(r"jaxlib\._jax\.|jaxtyping\.|~", "", text) for text in written)
    return signature, returned


def without_paths(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Leave out a variable's value that is a path of the machine on which the pages are built."""
    for node in list(content.parent.findall(addnodes.desc_annotation)):
        if str(PACKAGE.parent) in node.astext():
            node.parent.remove(node)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the hook."""
    for directive in (Room, Command, Options):
        app.add_directive(directive.__name__.lower(), directive)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", short_types)
    app.connect("object-description-transform", without_paths)
    return {"parallel_read_safe": True}
