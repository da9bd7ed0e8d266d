"""Reversible rules between published tensor names and ours.

    rules + the shapes of our parameters -> KeyMap -> read: published tensors -> ours; write: ours -> published

A rule names one module: where it is published, where it is ours, and its kind, which fixes its tensors and how each
is laid out. `{x}` stands for a number, the same on both sides; `{*}` for the layer of a stack, published as tensors of
its own and ours as the leading axis of one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from faithdiff_jax.weights.safetensors_format import Tensor, shown


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor is laid out in the two frameworks, as an axis order from published to ours."""

    axes: tuple[int, ...] | None = None

    def to_ours(self, array: Tensor) -> Tensor:
        """Published -> ours (a view)."""
        return array if self.axes is None else array.transpose(self.axes)

    def to_published(self, array: Tensor) -> Tensor:
        """Ours -> published (a view)."""
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape of a tensor that has `shape` here."""
        return shape if self.axes is None else tuple(shape[i] for i in np.argsort(self.axes))


SAME = Layout()
TRANSPOSED = Layout((1, 0))  # (out, in) -> (in, out)
OIHW_TO_HWIO = Layout((2, 3, 1, 0))

Kind = tuple[tuple[str, str, Layout], ...]
"""The tensors of a module: published suffix, our suffix, layout."""

CONV: Kind = ((".weight", ".kernel", OIHW_TO_HWIO), (".bias", ".bias", SAME))
LINEAR: Kind = ((".weight", ".kernel", TRANSPOSED), (".bias", ".bias", SAME))
LINEAR_WITHOUT_BIAS: Kind = ((".weight", ".kernel", TRANSPOSED),)
NORM: Kind = ((".weight", ".scale", SAME), (".bias", ".bias", SAME))
EMBEDDING: Kind = ((".weight", ".embedding", SAME),)
FUSED_PROJECTION: Kind = (("_weight", ".kernel", TRANSPOSED), ("_bias", ".bias", SAME))  # torch MultiheadAttention's


@dataclasses.dataclass(frozen=True)
class Rule:
    """One module: its published name, our path and its kind."""

    published: str
    ours: str
    kind: Kind

    def under(self, published: str = "", ours: str = "") -> "Rule":
        """The same rule with prefixes put before both names."""
        return Rule(published + self.published, ours + self.ours, self.kind)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the published tensors it is made of: one, or one a layer of a stack."""

    path: str
    shape: tuple[int, ...]
    published: tuple[str, ...]
    layout: Layout
    stacked: bool

    @property
    def published_shape(self) -> tuple[int, ...]:
        """Shape of each of the published tensors."""
        return self.layout.published_shape(self.shape[1:] if self.stacked else self.shape)


class KeyMap:
    """Every parameter of one model, matched with its published tensors.

    Args:
        rules: the model's rules.
        shapes: our path -> shape, for all parameters (see `flatten`).

    Raises:
        ValueError: a parameter that no rule, or more than one, speaks for: a fault in the rules, not in a checkpoint.
    """

    def __init__(self, rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]):
        compiled = [
            (_pattern(rule.ours + ours), rule.published + published, layout, "{*}" in rule.published)
            for rule in rules
            for published, ours, layout in rule.kind
        ]
        self.entries = []
        for path, shape in shapes.items():
            found = [
                (match, name, layout, stacked)
                for pattern, name, layout, stacked in compiled
                if (match := pattern.fullmatch(path))
            ]
            if len(found) != 1:
                raise ValueError(f"{len(found)} rules speak for the parameter {path}: must be exactly one")
            match, name, layout, stacked = found[0]
            for key, value in match.groupdict().items():
                name = name.replace("{" + key[1:] + "}", value)
            names = tuple(name.replace("{*}", str(i)) for i in range(shape[0])) if stacked else (name,)
            self.entries.append(Entry(path, tuple(shape), names, layout, stacked))

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape, for every tensor the model consists of."""
        return {name: entry.published_shape for entry in self.entries for name in entry.published}

    def read(self, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (our path, our array) one by one; `get` returns a published tensor by its name."""
        for entry in self.entries:
            if not entry.stacked:
                yield entry.path, np.ascontiguousarray(entry.layout.to_ours(get(entry.published[0])))
                continue
            first = get(entry.published[0])
            array = np.empty(entry.shape, first.dtype)
            for i, name in enumerate(entry.published):
                array[i] = entry.layout.to_ours(first if i == 0 else get(name))
            yield entry.path, array

    def write(self, entry: Entry, array: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (published name, published tensor) of one parameter of ours."""
        for name, layer in zip(entry.published, array if entry.stacked else (array,), strict=True):
            yield name, np.ascontiguousarray(entry.layout.to_published(layer))


def compare(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Name every tensor that is missing, unknown or mis-shaped among those found."""
    faults = [f"missing {name} {wanted[name]}" for name in wanted if name not in found]
    faults += [f"unknown {shown(name)} {tuple(found[name])}" for name in found if name not in wanted]
    faults += [
        f"mis-shaped {shown(name)} {tuple(found[name])}, wanted {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != shape
    ]
    return faults


def _pattern(template: str) -> re.Pattern[str]:
    """`a.{b}.c` -> a regular expression with the number as group `_b`."""
    literal = re.escape(template)
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<_\1>\\d+)", literal))
