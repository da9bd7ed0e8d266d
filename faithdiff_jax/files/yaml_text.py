"""YAML text, read within limits: what would take memory or time without end is refused."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from faithdiff_jax.errors import InputError, shown

# Far above any configuration, and read within seconds.
TEXT_LIMIT = 1 << 17  # bytes
DEPTH_LIMIT = 32  # of lists and mappings in one another
SIZE_LIMIT = 20_000  # values, each counted as often as an alias repeats it


def check_size(data: Any, source: str) -> None:
    """Refuse what is nested too deep or too large to go through, cycles among it."""
    nodes, count = [(data, 1)], 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > DEPTH_LIMIT:
            raise InputError(f"{source}: nested too deep, at most {DEPTH_LIMIT} lists and mappings in one another")
        if count > SIZE_LIMIT:
            raise InputError(f"{source}: more than {SIZE_LIMIT:,} values")
        if isinstance(node, Mapping):
            nodes += [(item, depth + 1) for item in node.values()]
        elif isinstance(node, (list, tuple)):
            nodes += [(item, depth + 1) for item in node]


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text holds; InputError, with `name` for the text, if it is none or beyond the limits."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = re.sub(r' in "<unicode string>",', "", " ".join(str(error).split()))
        raise InputError(f"{name} is not YAML ({reason[:200]})") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        # Dates such as 2024-13-45, numbers of thousands of digits, a tag without its value.
        raise InputError(f"{name}: has a value that cannot be used ({shown(str(error))[1:-1]})") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML within limits: aliases count as often as they repeat, and a key stands in a mapping once."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document, whose size and depth are known once its children are."""
        if self._depth >= DEPTH_LIMIT:
            raise yaml.YAMLError(f"nested too deep, at most {DEPTH_LIMIT} lists and mappings in one another")
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.YAMLError("an alias inside of what it stands for")
            return node
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
            self._check_keys(node)
        sizes = [self._sizes[id(child)] for child in children]
        size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if size > SIZE_LIMIT or depth > DEPTH_LIMIT:
            raise yaml.YAMLError(f"more than {SIZE_LIMIT:,} values, or more than {DEPTH_LIMIT} levels, by its aliases")
        self._sizes[id(node)] = size, depth
        return node

    @staticmethod
    def _check_keys(node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {shown(key.value)} occurs twice in a mapping")
                seen.add(key.value)
