"""What the checks on array shapes are made with; `conftest.py` puts them on the whole package."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import beartype
from jaxtyping import AbstractArray

# An int is a float, as PEP 484 has it.
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check every argument and the result of a function that states a shape, at every call.

    Others stay as they are: mypy reads their annotations, and tests give them what is wrong on purpose.
    """
    return _check(function) if any(map(_states_a_shape, function.__annotations__.values())) else function


@functools.cache
def _states_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_states_a_shape(inner) for inner in typing.get_args(hint) if not isinstance(inner, list))
