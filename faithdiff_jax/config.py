"""Configuration: frozen dataclasses, read from YAML with `key=value` overrides. Unknown keys are errors."""

import dataclasses
import difflib
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import dacite
import yaml

from faithdiff_jax.errors import InputError

Config = TypeVar("Config")

_PACKAGE = pathlib.Path(__file__).parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The configurations that come with the package: inside it where it is installed, beside it in the repository."""


def from_dict(cls: type[Config], data: Mapping[str, Any], source: str) -> Config:
    """Build a config dataclass from nested mappings.

    Raises:
        InputError: an unknown key, a wrong type or a value its config refuses, with `source` named.
    """
    _check_keys(cls, data, source)
    try:
        # YAML writes 1 for 1.0, and lists for tuples.
        complete = _tuples(_over_defaults(cls, data))
        return dacite.from_dict(cls, complete, dacite.Config(strict=True, type_hooks={float: _number}))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise InputError(f"{source}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain mapping that `from_dict` reads back."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def load_yaml(path: pathlib.Path | str) -> dict[str, Any]:
    """Read a YAML mapping; a missing, unreadable or other file is an InputError that names it."""
    path = pathlib.Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
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
    """Read a config file and apply `a.b=value` overrides, whose values are YAML."""
    return from_dict(cls, override(load_yaml(path), overrides), str(path))


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b=value` put in; keys are checked when the config is built."""
    data = _plain(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"override {text!r}: must be key=value, such as alignment.mixing=batch")
        *parents, name = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"override {text!r}: {parent} holds a value, not keys")
        try:
            node[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"override {text!r}: {value!r} is not a YAML value") from None
    return data


def _check_keys(cls: Any, data: Any, source: str, prefix: str = "") -> None:
    if isinstance(data, (list, tuple)):
        for i, item in enumerate(data):
            _check_keys(cls, item, source, f"{prefix[:-1]}[{i}].")
    if not isinstance(data, Mapping) or not dataclasses.is_dataclass(cls):
        return
    hints = typing.get_type_hints(cls)
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{source}: unknown key {prefix}{key} (known there: {', '.join(hints)})")
        if typing.get_origin(hints[key]) is tuple and not isinstance(value, (list, tuple)):
            raise InputError(f"{source}: {prefix}{key} is {value!r}: must be a list")
        inner = [hint for hint in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(hint)]
        named = typing.get_origin(hints[key]) is Mapping and isinstance(value, Mapping)
        for name, item in value.items() if inner and named else [("", value)] if inner else ():
            _check_keys(inner[0], item, source, f"{prefix}{key}.{name}{'.' if name else ''}")


def _over_defaults(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Put `data` over the defaults of `cls`: what a nested key leaves out is the field's default, not its class's."""
    merged = dict(data)
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default) and isinstance(data.get(field.name), Mapping):
            given = _over_defaults(type(default), data[field.name])
            merged[field.name] = {key.name: getattr(default, key.name) for key in dataclasses.fields(default)} | given
    return merged


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    """Tuples to lists all the way down, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
