"""Several sources mixed by weight into one endless, shuffled stream that can be entered anywhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from faithdiff_jax.data.checks import is_number, is_whole
from faithdiff_jax.data.shards import ShardSource
from faithdiff_jax.data.sources import PAIR_SCALE, PairFolder, PhotoFolder, Source
from faithdiff_jax.errors import InputError

LONGEST_SIDE = 8192
_WEIGHT_STEPS = 1_000_000  # weights are kept to six digits


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source: a folder as exactly one of `photos`, `pairs` or `shards`, and its share of the stream.

    `captions` is a folder of captions beside the default places. With `shorter_side` = (low, high), in HQ pixels, a
    picture is first resized (bicubic) until its shorter side has a length drawn evenly from the multiples of four in
    that range: the published faces use (512, 768).
    """

    photos: str | None = None
    pairs: str | None = None
    shards: str | None = None
    captions: str | None = None
    weight: float = 1.0
    shorter_side: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        folders = {"photos": self.photos, "pairs": self.pairs, "shards": self.shards}
        given = [f"{name}={folder}" for name, folder in folders.items() if folder is not None]
        if len(given) != 1:
            raise InputError(f"a source has {', '.join(given) or 'no folder'}: give one of {', '.join(folders)}")
        if self.shards is not None and self.captions is not None:
            raise InputError(f"captions={self.captions} with {given[0]}: shards hold their captions")
        if not (is_number(self.weight) and 1 / _WEIGHT_STEPS <= self.weight <= 1):
            raise InputError(f"weight {self.weight} of {given[0]}: must be above 0 and at most 1")
        if self.shorter_side is not None:
            low, high = self.shorter_side
            whole = is_whole(low) and is_whole(high)
            if not whole or not 0 < low <= high <= LONGEST_SIDE or low % PAIR_SCALE or high % PAIR_SCALE:
                limit = f"two multiples of {PAIR_SCALE} up to {LONGEST_SIDE}, the lower first"
                raise InputError(f"shorter_side {low}, {high} of {given[0]}: must be {limit}")

    def open(self) -> Source:
        """Open and check the source; raises InputError as its class says."""
        if self.shards is not None:
            return ShardSource(self.shards)
        if self.pairs is not None:
            return PairFolder(self.pairs, self.captions)
        return PhotoFolder(self.photos or "", self.captions)


def check_weights(sources: Sequence[SourceConfig]) -> None:
    """Raise InputError unless there are sources and their weights sum to one."""
    if not sources:
        raise InputError("sources is empty: at least one is needed")
    weights = [source.weight for source in sources]
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise InputError(f"weights {', '.join(map(str, weights))} sum to {sum(weights):g}: must sum to 1")


class Pick(NamedTuple):
    """Which record a position of the stream is: source number, how often that source was gone through, record."""

    source: int
    epoch: int
    record: int


class Mixture:
    """The endless stream: each source is gone through in an order shuffled anew each epoch, and has its exact share.

    Shares hold over every stretch of the stream, not just in the long run: the first n positions hold a source
    `weight * n` times to within one for each source. That is a narrower choice than drawing the source at random.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        self._lengths = tuple(lengths)
        self._steps = [round(weight * _WEIGHT_STEPS) for weight in weights]
        self._seed = seed
        # Computed, not looked up with grain's shuffle: that takes milliseconds a record where there are few of them.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> Pick:
        """Give what is at a position, from 0 up, without a look at the ones before."""
        number, turn = self._share_out(position)
        epoch, place = divmod(turn, self._lengths[number])
        return Pick(number, epoch, int(self._order(number, epoch)[place]))

    def _order(self, number: int, epoch: int) -> np.ndarray:
        """Give a source's records in an epoch's order; that of the epoch last asked for is kept."""
        kept_epoch, order = self._orders.get(number, (None, None))
        if kept_epoch != epoch or order is None:
            rng = np.random.default_rng([self._seed, epoch, number])
            order = rng.permutation(np.arange(self._lengths[number], dtype=np.uint32))
            self._orders[number] = epoch, order
        return order

    def _share_out(self, position: int) -> tuple[int, int]:
        """Give the source's number at a position, and how many earlier positions are that source's.

        The first source takes its share of all positions, spread evenly; the second its share of the rest; and so on.
        """
        left = sum(self._steps)
        for number, steps in enumerate(self._steps[:-1]):
            rest, rest_after = (place * (left - steps) // left for place in (position, position + 1))
            if rest == rest_after:
                return number, position - rest
            position, left = rest, left - steps
        return len(self._steps) - 1, position
