"""Compiled programs kept in a folder, so that another process neither traces nor compiles what one has compiled.

    arguments -> key -> file: SHA-256, executable, trees of arguments and results -> jax.stages.Compiled

A key is a digest of everything that the machine code depends on: the model's configuration, the program's name and
static arguments, shapes and places of its arrays, this package's source, versions, devices and flags. What cannot be
read is compiled again, silently; what cannot be written is said once. JAX's own cache saves compiling only, and tracing
a large model takes seconds as well.
"""

import contextlib
import contextvars
import functools
import hashlib
import logging
import os
import pathlib
import pickle
import platform as machine
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import faithdiff_jax
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import write_bytes
from faithdiff_jax.models.backend import forced

log = logging.getLogger("faithdiff_jax")

ENDING = ".executable"
DIGEST_BYTES = 32


class Executables:
    """A folder of compiled programs, which several processes may read and write at once.

    Attributes:
        folder: where they are.
        found: how many this process took from there.
        saved: how many it put there.
    """

    def __init__(self, folder: pathlib.Path):
        """Take a folder, which is made when there is something to keep."""
        self.folder = folder
        self.found = self.saved = 0
        self._complained = False

    def load(self, key: str) -> jax.stages.Compiled | None:
        """The program of a key; None if there is none, or none that this process can and may run."""
        path = self._path(key)
        try:
            if not _is_own(self.folder) or not _is_own(path):
                return None
            content = path.read_bytes()
        except OSError:
            return None
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        try:
            executable, arguments, results, ids = pickle.loads(payload)
            known = {device.id: device for device in jax.devices()}
            devices = [known[number] for number in ids]
            compiled: jax.stages.Compiled = serialize_executable.deserialize_and_load(
                executable, arguments, results, backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # whatever a runtime says to machine code that is not its own
            log.debug("%s: %s; compiled again", path, error)
            return None
        self.found += 1
        return compiled

    def save(self, key: str, compiled: jax.stages.Compiled) -> None:
        """Keep a program; where the folder cannot hold it, or the program cannot be kept, all goes on without."""
        try:
            executable, arguments, results = serialize_executable.serialize(compiled)
            runtime: Any = compiled.runtime_executable()
            ids = [device.id for device in runtime.local_devices()]
            payload = pickle.dumps((executable, arguments, results, ids))
        except Exception as error:  # not every runtime can
            log.debug("a program cannot be kept: %s", error)
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._path(key), hashlib.sha256(payload).digest() + payload)
            self.saved += 1
        except (OSError, InputError) as error:
            if not self._complained:
                self._complained = True
                log.warning("compiled programs are not kept: %s", error)

    def _path(self, key: str) -> pathlib.Path:
        return self.folder / (key + ENDING)


_only_compile: contextvars.ContextVar[bool] = contextvars.ContextVar("only_compile", default=False)
_kept: Executables | None = None


def keep_in(folder: str | os.PathLike[str] | None) -> None:
    """Keep the programs of this process in a folder from now on, and take them from there; None for no longer.

    The folder holds machine code: what is in it is run. Files and folders of other users, or that others may write to,
    are not read.
    """
    global _kept
    _kept = None if folder is None else Executables(pathlib.Path(folder))


def kept() -> Executables | None:
    """Where programs are kept, if they are. With several processes of one computation, they are not."""
    return _kept if jax.process_count() == 1 else None


@contextlib.contextmanager
def only_compile() -> Iterator[None]:
    """Inside, programs compile and do not run: their results are zeros, and parameters may be shapes."""
    token = _only_compile.set(True)
    try:
        yield
    finally:
        _only_compile.reset(token)


def compiles_only() -> bool:
    """Whether programs run, or compile only."""
    return _only_compile.get()


def compiled_anew(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program to be kept: not one that JAX's own cache has, of which a CPU cannot write all down again."""
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # whether it is used is asked once
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def zeros(compiled: jax.stages.Compiled) -> Any:
    """What a program gives, as zeros, where it would put it."""
    flat, tree = jax.tree.flatten(compiled.out_info)
    places = jax.tree.leaves(compiled.output_shardings)
    # What lies on the default device alone may be moved from there, as what a program gives there.
    blank = [
        jax.device_put(np.zeros(leaf.shape, leaf.dtype), None if place.device_set == {jax.devices()[0]} else place)
        for leaf, place in zip(flat, places, strict=True)
    ]
    return jax.tree.unflatten(tree, blank)


def key_of(name: str, identity: str, arguments: Sequence[Any], static: Sequence[Any]) -> str:
    """The digest of what a program's machine code depends on.

    Args:
        name: of the function.
        identity: of what it is made for beside its arguments: configuration, dtype, mesh.
        arguments: arrays, or their shapes.
        static: values that are part of the program.
    """
    leaves, tree = jax.tree.flatten(arguments)
    parts = [
        name,
        identity,
        str(tree),
        *map(_described, leaves),
        *map(repr, static),
        *forced(),
        *_flags(),
        _environment(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _described(leaf: Any) -> str:
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    sharding = getattr(leaf, "sharding", None)
    # What lies on the default device alone, or nowhere yet, is one program.
    place = "" if sharding is None or sharding.device_set == {jax.devices()[0]} else sharding
    return f"{aval.shape} {aval.dtype} {getattr(aval, 'weak_type', False)} {place}"


def _flags() -> list[str]:
    """What changes programs and can change while a process runs."""
    names = ("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_rank_promotion", "jax_default_device")
    return [f"{name}={getattr(jax.config, name)}" for name in names]


@functools.cache
def _environment() -> str:
    """Versions, devices, flags of the compilers, and the source of this package."""
    devices = jax.devices()
    source = hashlib.sha256()
    root = pathlib.Path(faithdiff_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    parts = (
        jax.__version__, jaxlib.version.__version__, flax.__version__, machine.python_version(), machine.machine(),
        devices[0].client.platform_version, [(device.id, device.device_kind) for device in devices],
        os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", ""), _processor(), source.hexdigest(),
    )  # fmt: skip
    return "\n".join(map(str, parts))


def _processor() -> str:
    """What the processor can do: on CPU, machine code is for it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return machine.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _is_own(path: pathlib.Path) -> bool:
    """Whether it belongs to this user and nobody else may write to it; always where users have no numbers."""
    if not hasattr(os, "geteuid"):
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
