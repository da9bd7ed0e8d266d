"""Options as forms and schemas have them, made of what is known of each field of `RestoreOptions`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from faithdiff_jax.config import to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import OF_TILES
from faithdiff_jax.files.reading import printable
from faithdiff_jax.inference.about import READERS, WHOLE_NUMBERS, About
from faithdiff_jax.inference.options import RestoreOptions

OF_THE_SERVICE = ("batch",)
"""Options that are the service's to choose, not a request's: how much goes through the UNet together."""
_TYPES: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", WHOLE_NUMBERS: "string"}


def option_fields() -> dict[str, About]:
    """Name -> what is known of each option that a request may choose."""
    fields = dataclasses.fields(RestoreOptions)
    return {field.name: field.metadata["about"] for field in fields if field.name not in OF_THE_SERVICE}


def public(options: RestoreOptions) -> dict[str, Any]:
    """Those that a request may choose, as plain data."""
    return {name: value for name, value in to_dict(options).items() if name not in OF_THE_SERVICE}


def changed(options: RestoreOptions, texts: Mapping[str, str]) -> RestoreOptions:
    """Options with those replaced that a form names.

    Raises:
        InputError: an option that there is not, text of another kind, or a value out of its range.
    """
    known = option_fields()
    unknown = [printable(name)[:40] for name in texts if name not in known]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)} (known: {', '.join(known)})")
    given = {}
    for name, text in texts.items():
        try:
            given[name] = READERS[known[name].kind](text)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return options.replace(**given)


def schema(name: str, about: About, default: Any) -> dict[str, Any]:
    """An option as JSON Schema, as OpenAPI describes a form's field."""
    found: dict[str, Any] = {"type": _TYPES[about.kind], "description": f"{about.help} ({about.range})"}
    if about.within is not None and about.kind != WHOLE_NUMBERS:
        low, high = about.within.low, about.within.high
        found["exclusiveMinimum" if about.within.above else "minimum"] = low
        found["exclusiveMaximum" if about.within.below else "maximum"] = high
    if about.among:
        found["enum"] = list(about.among)
    if default is not None:
        found["default"] = list(default) if isinstance(default, tuple) else default
    return found


def form_schema(defaults: RestoreOptions, presets: Mapping[str, RestoreOptions], limits: str) -> dict[str, Any]:
    """The form that sends a picture, as JSON Schema; `limits` says in words what a picture may be."""
    values = public(defaults)
    fields: dict[str, Any] = {
        "picture": {"type": "string", "format": "binary", "description": f"JPEG, PNG, WebP or TIFF; {limits}"},
        "caption": {"type": "string", "default": "", "description": "what the picture shows, used as it is"},
    }
    tiles = "instead: a JSON list of strings, what each tile shows, from left to right and then down"
    fields[OF_TILES] = {"type": "string", "description": tiles}
    if presets:
        about = "the model's own choice of the options below; those that are given go before it"
        fields["preset"] = {"type": "string", "enum": list(presets), "description": about}
    fields |= {name: schema(name, about, values[name]) for name, about in option_fields().items()}
    return {"type": "object", "required": ["picture"], "properties": fields, "additionalProperties": False}
