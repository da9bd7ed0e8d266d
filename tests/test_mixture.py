"""The endless stream of several sources: epochs, orders and shares."""

import math
from collections import Counter

import pytest

from faithdiff_jax.data.mixture import Mixture


def test_an_epoch_holds_every_record_once_in_an_order_of_its_own():
    mixture = Mixture([50], [1.0], seed=3)
    epochs = [[mixture[position] for position in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    for number, picks in enumerate(epochs):
        assert {pick.epoch for pick in picks} == {number}
        assert sorted(pick.record for pick in picks) == list(range(50))
    orders = [[pick.record for pick in picks] for picks in epochs]
    orders.append([Mixture([50], [1.0], seed=4)[position].record for position in range(50)])
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert Mixture([1], [1.0], seed=0)[5] == (0, 5, 0)


@pytest.mark.parametrize("weights", [(0.875, 0.125), (0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.999, 0.001)])
def test_a_mixture_keeps_its_weights(weights):
    count = 4000
    mixture = Mixture([70, 11, 5][: len(weights)], weights, seed=0)
    picks = [mixture[position] for position in range(count)]
    for number, weight in enumerate(weights):
        mine = [pick for pick in picks if pick.source == number]
        assert abs(len(mine) - weight * count) <= min(len(weights), 4 * math.sqrt(count * weight * (1 - weight)))
        # Each source goes through its own epochs without a gap.
        length = [70, 11, 5][number]
        assert [pick.epoch for pick in mine] == [turn // length for turn in range(len(mine))]
        assert all(seen == 1 for seen in Counter(pick[1:] for pick in mine).values())
