"""The API's description as a page that loads nothing from anywhere; programs read /openapi.json."""

import html
import json
from collections.abc import Mapping
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
section { border-top: 1px solid #8886; margin-top: 1.5rem }
b.verb { display: inline-block; min-width: 4.5rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
td { border-top: 1px solid #8883; vertical-align: top } pre { overflow-x: auto; padding: .6rem; background: #8881 }
"""


def reference_page(described: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: every path, its parameters, its form and its answers."""
    about = described["info"]
    sections = [
        _operation(path, verb, operation)
        for path, verbs in described["paths"].items()
        for verb, operation in verbs.items()
    ]
    title = f"{html.escape(about['title'])} {html.escape(about['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(about['description'])} "
        f'For programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(sections)}</html>'
    )


def _operation(path: str, verb: str, operation: Mapping[str, Any]) -> str:
    rows = [(one["name"], one["in"], one["schema"]) for one in operation.get("parameters", ())]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows += [(name, "form", one) for name, one in content["schema"]["properties"].items()]
    table = "".join(
        f"<tr><td><code>{html.escape(name)}</code><td>{where}<td>{_kind(schema)}<td>{_default(schema)}"
        f"<td>{html.escape(schema.get('description', ''))}"
        for name, where, schema in rows
    )
    head = "<tr><th>name<th>in<th>type<th>default<th>meaning"
    answers = "".join(
        f"<tr><td><code>{code}</code><td>{html.escape(answer.get('description', ''))}"
        for code, answer in sorted(operation["responses"].items())
    )
    return (
        f'<section><h2><b class="verb">{verb.upper()}</b><code>{html.escape(path)}</code></h2>'
        f"<p>{html.escape(operation.get('summary', ''))}. {html.escape(operation.get('description', ''))}</p>"
        + (f"<table>{head}{table}</table>" if rows else "")
        + f"<p>Answers:</p><table>{answers}</table></section>"
    )


def _kind(schema: Mapping[str, Any]) -> str:
    words = [json.dumps(word) for word in schema.get("enum", ())] or [str(schema.get("type", "text"))]
    return html.escape(", ".join(words))


def _default(schema: Mapping[str, Any]) -> str:
    return f"<code>{html.escape(json.dumps(schema['default']))}</code>" if "default" in schema else ""
