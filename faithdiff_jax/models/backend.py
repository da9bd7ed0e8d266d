"""What programs are traced for: the platform, by which attention and convolutions are chosen, and a mesh."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding

Value = TypeVar("Value")
Place = Callable[[int], NamedSharding]
"""Samples -> where a batch of so many lies."""

PLATFORMS = ("cuda", "rocm", "tpu", "cpu")

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced_for", default=None)
_batches: contextvars.ContextVar[Place | None] = contextvars.ContextVar("batches", default=None)
_forced: contextvars.ContextVar[tuple[contextvars.ContextVar[Any], ...]] = contextvars.ContextVar("forced", default=())


def platform() -> str:
    """ "cuda", "rocm", "tpu" or "cpu": what is traced for, JAX's default backend unless `trace_for` says another."""
    return _traced_for.get() or default_platform()


@functools.cache
def default_platform() -> str:
    """ "cuda", "rocm", "tpu" or "cpu": JAX's default backend."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    version = jax.devices()[0].client.platform_version.lower()
    return "rocm" if "rocm" in version else "cuda"


def trace_for(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose as on another platform for everything traced inside, to compile for machines that are not there."""
    if name not in PLATFORMS:
        raise ValueError(f"platform {name!r}: must be one of {', '.join(PLATFORMS)}")
    return setting(_traced_for, name)


@contextlib.contextmanager
def batches_placed(place: Place | None) -> Iterator[None]:
    """Say where batches of so many samples lie in what is traced inside; None for one device.

    XLA splits what it knows over a mesh by itself, but not kernels of our own choice.
    """
    token = _batches.set(place)
    try:
        yield
    finally:
        _batches.reset(token)


def batch_place(samples: int) -> NamedSharding | None:
    """Where a batch of so many samples lies, as `batches_placed` said; None for one device."""
    place = _batches.get()
    return None if place is None else place(samples)


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[Value], value: Value) -> Iterator[None]:
    """Give a context variable, which changes what is traced, a value for the time of a `with` block."""
    token, others = variable.set(value), _forced.set((*_forced.get(), variable))
    try:
        yield
    finally:
        _forced.reset(others)
        variable.reset(token)


def forced() -> tuple[str, ...]:
    """The choices that `setting` makes at this moment: a program traced now is another one than without them."""
    return tuple(f"{variable.name}={variable.get()}" for variable in _forced.get())
