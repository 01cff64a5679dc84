"""The order of samples: every row once an epoch of its bucket, a step of one shape, a function of the position."""

from collections import Counter

import numpy as np
import pytest

from latentdiff.diffusion import noise
from latentdiff.training.order import Order

BUCKETS = [np.arange(0, 13), np.arange(13, 16), np.arange(16, 57)]


def test_one_bucket_is_a_permutation_an_epoch():
    order = Order(3, "training", [np.arange(10)], group=4)
    for epoch in range(5):
        keys = [order.key(position) for position in range(10 * epoch, 10 * epoch + 10)]
        assert [row for row, _ in keys] == noise.permutation(10, 3, "training order", epoch).tolist()
        assert {own for _, own in keys} == {epoch}


@pytest.mark.parametrize("group", [1, 4, 8, 64])
def test_groups_are_of_one_bucket_and_nothing_is_lost(group):
    """57 epochs' worth of positions: groups whole, each row's epochs 0, 1, 2, ... without a gap, shares as they are."""
    order = Order(0, "training", BUCKETS, group)
    of_row = {int(row): number for number, rows in enumerate(BUCKETS) for row in rows}
    steps = 57 * 57 // group
    keys = [order.key(position) for position in range(steps * group)]
    for step in range(steps):
        assert len({of_row[row] for row, _ in keys[step * group : (step + 1) * group]}) == 1
    seen: dict[int, list[int]] = {}
    for row, epoch in keys:
        seen.setdefault(row, []).append(epoch)
    for row, epochs in seen.items():
        assert epochs == list(range(len(epochs))), row
    times = Counter(row for row, _ in keys)
    assert set(times) == set(range(57))
    for rows in BUCKETS:  # within an epoch of the sequence and a group's own share
        assert all(abs(times[int(row)] - 57) <= 1 + group / len(rows) + 1 for row in rows)


def test_a_position_says_all():
    """Asked in any order, by a new object: the same; by another seed or group: not."""
    order = Order(0, "training", BUCKETS, 8)
    forward = [order.key(position) for position in range(400)]
    backward = [Order(0, "training", BUCKETS, 8).key(position) for position in reversed(range(400))]
    assert forward == backward[::-1]
    assert forward != [Order(1, "training", BUCKETS, 8).key(position) for position in range(400)]


def test_buckets_are_mixed_over_an_epoch():
    """Not one after the other: each half of an epoch's steps holds each large bucket about alike."""
    rows = [np.arange(400), np.arange(400, 800)]
    order = Order(0, "training", rows, 8)
    halves = [Counter(order.key(8 * step)[0] // 400 for step in part) for part in (range(50), range(50, 100))]
    assert all(15 <= half[0] <= 35 for half in halves)
    assert halves[0][0] + halves[1][0] == 50
