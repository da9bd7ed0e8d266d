"""The stream of training batches: shuffled, mixed, split over processes, made by parallel workers, and resumable.

What is at a position of the stream depends on the sources and the configuration only. Workers, prefetching and the
number of processes change how fast a batch comes, never what is in it, so the saved position is one number.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from absl import flags

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.data.checks import check_probability, is_whole
from faithdiff_jax.data.mixture import Mixture, SourceConfig, check_weights
from faithdiff_jax.data.samples import Sample, SampleConfig, make_sample
from faithdiff_jax.data.sources import Source
from faithdiff_jax.data.workers import lost_workers_end_it, start_worker
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files.images import to_float

SHARED_MEMORY = "/dev/shm"
BATCHES, SEEDS = Range(1, 1 << 20, whole=True), Range(0, (1 << 32) - 1, whole=True)
SECONDS = Range(0, 1_000_000, above=True)
Tokenize = Callable[[Sequence[str]], Sequence[np.ndarray]]
Batch = dict[str, np.ndarray]
logger = logging.getLogger(__name__)
_FLOAT_LEVELS = to_float(np.arange(256, dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class DataConfig(SampleConfig):
    """The sources of the stream, how samples are cut from them, and how the stream is read.

    `workers` are operating system processes beside this one; 0 makes each batch when it is asked for. Each worker makes
    whole batches, `prefetch` of them ahead; if none comes for `timeout` seconds, training stops. Of all records a share
    of up to `bad_file_limit` may turn out unreadable before training stops.
    """

    sources: tuple[SourceConfig, ...] = ()
    workers: int = 0
    prefetch: int = 1
    timeout: float = 600.0
    bad_file_limit: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources:
            check_weights(self.sources)
        counts = {"workers": Range(0, 1024, whole=True), "prefetch": Range(1, 1024, whole=True)}
        check_ranges(self, **counts, timeout=SECONDS)
        check_probability(self, "bad_file_limit")


class BadRecord(NamedTuple):
    """A record that could not be used: its source's number, its own, and the reason, which names the file."""

    source: int
    record: int
    reason: str


class Stream:
    """The endless sequence of samples that a configuration describes: `stream[position]`, for any position.

    Each is a function of (seed, epoch, source, record): its generator is seeded with these four numbers. A record that
    cannot be read is replaced by the next readable one of its source, with the generator of the record it replaces.
    """

    def __init__(self, config: DataConfig, sources: Sequence[Source], seed: int):
        self._config, self._seed = config, seed
        self._sources = tuple(sources)
        weights = [source.weight for source in config.sources]
        self._mixture = Mixture([len(source) for source in sources], weights, seed)
        self.bad_limit = int(config.bad_file_limit * sum(map(len, sources)))

    def __getitem__(self, position: int) -> tuple[Sample, np.ndarray, list[BadRecord]]:
        """Make one sample; also (source, epoch, record) as three int32, and the bad records met on the way.

        Raises InputError after more bad records in a row than may be bad in all.
        """
        number, epoch, first = self._mixture[position]
        source, bad = self._sources[number], []
        for index in range(first, first + min(len(source), self.bad_limit + 1)):
            index %= len(source)
            rng = np.random.default_rng([self._seed, epoch, number, first])
            try:
                shorter_side = self._config.sources[number].shorter_side
                sample = make_sample(source[index], rng, self._config, shorter_side)
            except InputError as error:
                bad.append(BadRecord(number, index, str(error)))
            else:
                return sample, np.array([number, epoch, index], np.int32), bad
        allowed = f"bad_file_limit {self._config.bad_file_limit:g} allows {self.bad_limit} in all"
        raise InputError(f"{source.folder}: {len(bad)} unusable records, {allowed}; the last: {bad[-1].reason}")


class Loader:
    """The stream's batches for one of `process_count` processes; iterate over it for `BatchIterator`s.

    The processes' batches, put one below the other in the order of `process_index`, are the batch that a single
    process would get. `tokenize` gives the token ids of B captions, a (B, 77) int32 array for each text encoder;
    it must survive pickling if there are workers. `batch` is the global one, shared evenly by all processes; `seed` is
    a whole number below 2^32. Scripts that use workers need the `if __name__ == "__main__"` guard.

    A batch is a dict of `hq`, `lq` (B, crop, crop, 3) float32 in [-1, 1]; `token_ids_0`, `token_ids_1`, ...
    (B, 77) int32; `time_ids` (B, 6) float32, see `Sample`; and `index` (B, 3) int32: source, epoch and record.

    Raises:
        InputError: there are no sources or one cannot be opened, the processes cannot share a batch evenly, or a batch
            does not fit into the memory, or those of the workers into the shared memory.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenize: Tokenize,
        *,
        batch: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index}: must be from 0 to {process_count - 1}")
        for name, value, allowed in (("batch", batch, BATCHES), ("seed", seed, SEEDS)):
            if value not in allowed:
                raise InputError(f"{name} is {shown(value)}: {allowed}")
        if batch % process_count:
            raise InputError(f"batch is {batch}: must be a multiple of the number of processes, {process_count}")
        check_weights(config.sources)
        self.config, self.batch, self.seed = config, batch, seed
        self.tokenize = tokenize
        self.local_batch = batch // process_count
        self.first_row = process_index * self.local_batch
        _check_memory(config, self.local_batch)
        self.sources = [source.open() for source in config.sources]
        self.stream = Stream(config, self.sources, seed)
        for source, settings in zip(self.sources, config.sources, strict=True):
            logger.info("%s (%g %% of the stream)", source.summary, 100 * settings.weight)

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """Of each source: what changes where a file's name or size does. Every file is looked up, once a run."""
        return [source.fingerprint() for source in self.sources]

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator:
    """The batches from a position on, without end. `close` it, or use it in a `with`, to stop its workers.

    Bad records are logged as warnings, once each; with more of them than the limit, `next` raises InputError. Each
    process counts those it has met since it was started. A worker that died, or hangs, is a WorkerError.
    """

    def __init__(self, loader: Loader):
        self._loader = loader
        self._position = 0
        self._batches: Any = None
        self._bad: set[tuple[int, int]] = set()

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        config = self._loader.config
        if self._batches is None:
            self._batches = iter(self._pipeline())
        with lost_workers_end_it(config.timeout) if config.workers else contextlib.nullcontext():
            batch, bad = next(self._batches)
        self._count(bad)
        self._position += self._loader.batch
        # Arrays from a worker lie in shared memory, which an array that outlives its iterator would still hold at exit.
        return {name: array if type(array) is np.ndarray else np.array(array) for name, array in batch.items()}

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        """Give the position after the last batch, and what it counts in: plain numbers, for JSON."""
        config, sources = self._loader.config, self._loader.sources
        return {
            "position": self._position,
            "seed": self._loader.seed,
            "records": [len(source) for source in sources],
            "weights": [source.weight for source in config.sources],
            "fingerprints": self._loader.fingerprints,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch after which `get_state` was called; nothing that lies before is read.

        Workers, prefetching, the batch size and the number of processes may differ. Raises InputError if the seed,
        the number of records, their names and sizes or the weights do: the position would mean something else. A state
        of an earlier version has no fingerprints, and then names and sizes are not compared.
        """
        for name, expected in self.get_state().items():
            if name == "fingerprints":
                self._check_fingerprints(state.get(name))
                continue
            if name not in state:
                raise InputError(f"the saved data position has no {name!r}, it is not one of this loader's")
            if name != "position" and state[name] != expected:
                raise InputError(f"the saved data position has {name} {state[name]}, the data now has {expected}")
        position = state["position"]
        if not (is_whole(position) and 0 <= position < sys.maxsize):
            raise InputError(f"the saved data position has position {position!r:.60}, it must be a count of samples")
        self.close()
        self._position = position

    def _check_fingerprints(self, saved: Sequence[str] | None) -> None:
        for source, before, now in zip(self._loader.sources, saved or (), self._loader.fingerprints, strict=False):
            if before != now:
                raise InputError(
                    f"{source.folder}: files were replaced, renamed or exchanged since the position was saved (their "
                    "names and sizes differ); put them back, or give another --output"
                )

    def close(self) -> None:
        """Stop the workers. The next batch starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _pipeline(self) -> grain.IterDataset:
        """Build grain's pipeline from the position on: its own state, which depends on the workers, is never kept."""
        config = self._loader.config
        # grain 0.2.18 reads a command-line flag of its own, and fails where absl has not parsed them (its issue 1355).
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        source = _Batches(self._loader, self._position)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        workers = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch)
        return dataset.mp_prefetch(workers, worker_init_fn=start_worker)

    def _count(self, bad: Sequence[BadRecord]) -> None:
        for record in bad:
            if record[:2] not in self._bad:
                self._bad.add(record[:2])
                logger.warning("skipped, %d so far: %s", len(self._bad), record.reason)
        limit = self._loader.stream.bad_limit
        if len(self._bad) > limit:
            share = self._loader.config.bad_file_limit
            raise InputError(f"{len(self._bad)} unusable records, bad_file_limit {share:g} allows {limit}; see the log")


class _Batches:
    """One process's batches from a position of the stream on, by number: what grain's workers share among them."""

    def __init__(self, loader: Loader, start: int):
        self._stream, self._tokenize = loader.stream, loader.tokenize
        self._start, self._step = start + loader.first_row, loader.batch
        self._rows = loader.local_batch

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> tuple[Batch, list[BadRecord]]:
        first = self._start + number * self._step
        samples, indices, bad = zip(*(self._stream[first + row] for row in range(self._rows)), strict=True)
        batch = {
            "hq": _stack_floats([sample.hq for sample in samples]),
            "lq": _stack_floats([sample.lq for sample in samples]),
            "time_ids": np.stack([sample.time_ids for sample in samples]),
            "index": np.stack(indices),
        }
        for encoder, ids in enumerate(self._tokenize([sample.caption for sample in samples])):
            batch[f"token_ids_{encoder}"] = ids
        return batch, [record for met in bad for record in met]


def _stack_floats(images: Sequence[np.ndarray]) -> np.ndarray:
    """Stack uint8 images as `to_float` gives them, bit for bit; a table does it in a third of the time."""
    stack = np.empty((len(images), *images[0].shape), np.float32)
    for row, image in zip(stack, images, strict=True):
        cv2.LUT(image, _FLOAT_LEVELS, dst=row)
    return stack


def _check_memory(config: DataConfig, local_batch: int) -> None:
    """Refuse what cannot fit before anything is read: writing beyond the shared memory kills a worker silently."""
    batch_bytes = local_batch * 2 * config.crop**2 * 3 * 4
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if batch_bytes > memory:
        raise InputError(
            f"{local_batch:,} samples with crop {config.crop} take {batch_bytes / 1e9:.1f} GB in each process, "
            f"the machine has {memory / 1e9:.1f} GB: lower batch or crop"
        )
    if not config.workers or not os.path.isdir(SHARED_MEMORY):
        return
    # For each worker those waiting and the one to follow; and two in use here.
    needed = (config.workers * (config.prefetch + 1) + 2) * batch_bytes
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise InputError(
            f"workers {config.workers} with prefetch {config.prefetch} need {needed / 1e9:.1f} GB of shared memory, "
            f"{SHARED_MEMORY} has {free / 1e9:.1f} GB free: lower them or batch, or enlarge it (docker: --shm-size)"
        )
