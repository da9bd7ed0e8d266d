"""Configuration: frozen dataclasses, read from YAML with `key=value` overrides, each value checked by name.

    YAML text --limits--> nested mappings --overrides, types, ranges--> a frozen dataclass

A field is annotated with bool, int, float, str, `Literal`, a config dataclass, `tuple[...]`, `Mapping[str, ...]` or
`Any`, or one of these `| None`. Unknown keys and wrong types are errors; ranges are each config's own (`check_ranges`).
"""

import dataclasses
import difflib
import math
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from faithdiff_jax.errors import SHOWN_AT_MOST, InputError
from faithdiff_jax.errors import shown as shown  # for those who check values
from faithdiff_jax.files.reading import read_text
from faithdiff_jax.files.yaml_text import DEPTH_LIMIT, TEXT_LIMIT, check_size, parse_yaml

Config = TypeVar("Config")

LARGEST_WHOLE = 2**63

_PACKAGE = pathlib.Path(__file__).parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The configurations that come with the package: inside it where it is installed, beside it in the repository."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high` that a field may have; NaN is in none.

    `above` leaves out `low` itself and `below` leaves out `high`; `whole` takes integers only; `optional` takes None.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False
    optional: bool = False

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        # Comparisons with NaN are false: only what is known to be inside passes.
        inside_low = self.low < value if self.above else self.low <= value
        return inside_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        kind = "a whole number " if self.whole else ""
        low, high = (_digits(limit) for limit in (self.low, self.high))
        if self.above or self.below:
            text = f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        else:
            text = f"from {low} to {high}"
        return f"must be {kind}{text}{', or null' * self.optional}"


def check_ranges(config: object, **ranges: Range) -> None:
    """Compare fields of a config with their ranges, in `__post_init__`.

    Raises:
        InputError: a field is outside, with its value and the range.
    """
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value not in allowed:
            raise InputError(f"{name} is {shown(value)}: {allowed}")


def check_choice(config: object, name: str, choices: Sequence[str]) -> None:
    """See that a field is one of a few words.

    Raises:
        InputError: it is not.
    """
    value = getattr(config, name)
    if value not in choices:
        raise InputError(f"{name} is {shown(value)}: must be one of {', '.join(choices)}")


def from_dict(cls: type[Config], data: Mapping[str, Any], source: str) -> Config:
    """Build a config dataclass from nested mappings.

    What a nested mapping leaves out is the default of its field, not of the field's class.

    Raises:
        InputError: an unknown key, a wrong type or a value its config refuses, with `source` and the key's full name.
    """
    check_size(data, source)
    try:
        config: Config = _build(cls, data, "", None)
    except _Fault as fault:
        raise InputError(f"{source}: {fault}") from None
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain mapping that `from_dict` reads back."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def load_yaml(path: pathlib.Path | str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: a missing, unreadable, too large or too deeply nested file, or one of something else.
    """
    data = parse_yaml(read_text(path, TEXT_LIMIT, "YAML file"), str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, a mapping of keys to values is needed")
    return data


def find_config(name: str, beside: pathlib.Path | None = None) -> pathlib.Path:
    """Find a configuration: a file, or one that comes with the package by its name, such as `ablations/encoder_fixed`.

    A file goes before a configuration of the same name. Relative paths are those of the folder `beside`, if given.

    Raises:
        InputError: there is neither; the names that there are are listed.
    """
    path = (beside or pathlib.Path()) / name
    if os.path.isfile(path):
        return path
    names = config_names()
    if name in names:
        return CONFIGS / f"{name}.yaml"
    short = {known.rpartition("/")[2]: known for known in names} | {known: known for known in names}
    close = difflib.get_close_matches(name.removesuffix(".yaml"), short, n=1)
    hint = f"did you mean {short[close[0]]}? the" if close else "the"
    raise InputError(f"{name!r}: no such file, nor the name of a configuration; {hint} names are {', '.join(names)}")


def config_names() -> list[str]:
    """The names that `find_config` knows."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def load(cls: type[Config], path: pathlib.Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `a.b=value` overrides, whose values are YAML; errors as the three have them."""
    return from_dict(cls, override(load_yaml(path), overrides), str(path))


def override(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=value` put in; keys are checked when the config is built.

    Raises:
        InputError: not key=value, a value that is not YAML, or a key below another one's value.
    """
    check_size(data, "config")
    changed: dict[str, Any] = _plain(dict(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"override {shown(text)}: must be key=value, such as alignment.mixing=batch")
        *parents, name = key.split(".")
        if len(parents) >= DEPTH_LIMIT:
            raise InputError(f"override {shown(text)}: a key has at most {DEPTH_LIMIT} names")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"override {shown(text)}: {parent} holds a value, not keys")
        if len(value) > TEXT_LIMIT:
            raise InputError(f"override {shown(text)}: at most {TEXT_LIMIT:,} characters are read")
        node[name] = parse_yaml(value, f"override {shown(text)}: {shown(value)}")
    return changed


def merged(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` put over `base`, mapping by mapping; any other value is replaced as a whole."""
    result = dict(base)
    for key, value in data.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


class _Fault(Exception):
    """What is wrong with a value: the message begins with the key's full name."""


def _build(hint: Any, value: Any, name: str, default: Any) -> Any:
    """The value as a field of this type has it; `name` is its full key, `default` what its own keys fall back to."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _build(inner, value, name, default)
    if origin is typing.Literal:
        if value not in arguments:
            raise _Fault(f"{name} is {shown(value)}: must be one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build_config(hint, value, name, default)
    if origin is tuple:
        return _build_tuple(arguments, value, name)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _build(arguments[1], item, f"{name}.{key}", None) for key, item in _keys(value, name)}
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_WHOLE:
        return float(value)  # YAML writes 1 for 1.0
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _Fault(f"{name} is {shown(value)}: must be {_TYPES[hint]}")
    return value


def _build_config(cls: type, value: Any, name: str, default: Any) -> Any:
    if isinstance(value, cls):
        return value
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    arguments = {} if default is None else {key: getattr(default, key) for key in fields}
    for key, item in _keys(value, name or "it"):
        if key not in fields:
            unknown = _inside(name, key if isinstance(key, str) and key.isprintable() else shown(key))
            raise _Fault(f"unknown key {unknown[:SHOWN_AT_MOST]} (known there: {', '.join(fields)})")
        inner = arguments.get(key, _default(fields[key]))
        arguments[key] = _build(hints[key], item, _inside(name, key), inner if _is_config(inner) else None)
    missing = [key for key, field in fields.items() if key not in arguments and _default(field) is dataclasses.MISSING]
    if missing:
        raise _Fault(f"{_inside(name, missing[0])} is missing")
    try:
        return cls(**arguments)
    except (ValueError, TypeError, OverflowError) as error:
        text = " ".join(str(error).split())
        named = text.split(" ")[0].split(".")[0] in fields
        raise _Fault(text if not name else f"{name}.{text}" if named else f"{name}: {text}") from None


def _build_tuple(arguments: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _Fault(f"{name} is {shown(value)}: must be a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise _Fault(f"{name} is {shown(value)}: must be a list of {len(arguments)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_build(argument, item, f"{name}[{i}]", None) for i, (argument, item) in pairs)


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _keys(value: Any, name: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise _Fault(f"{name} is {shown(value)}: must be a mapping of keys to values")
    yield from value.items()


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _digits(limit: float) -> str:
    return str(int(limit)) if math.isfinite(limit) and limit == int(limit) and abs(limit) < 1e15 else f"{limit:g}"


def _plain(value: Any) -> Any:
    """Tuples to lists and mappings to dicts all the way down, as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
