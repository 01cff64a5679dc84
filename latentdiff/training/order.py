"""The order of samples: the row and the epoch at each position of the endless sequence.

Rows of one bucket have one shape, and all positions of a group, which is one step, belong to one bucket. Every bucket
is an endless sequence of its own, epoch after epoch, each in a new order. Epoch e of the whole takes from bucket b with
n_b rows the groups of size G with numbers floor(e n_b / G) to floor((e + 1) n_b / G) - 1. So no row is dropped, no
group is short, the remaining rows begin the next epoch, and everything is a function of the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from latentdiff.diffusion import noise


class Order:
    """An order keyed by (seed, purpose, epoch). With one bucket each epoch is a permutation of all rows."""

    def __init__(self, seed: int, purpose: str, buckets: Sequence[np.ndarray], group: int = 1):
        self.buckets = list(buckets)
        self._seed, self._purpose, self._group = seed, purpose, group
        self._rows_of = lru_cache(maxsize=4 * len(self.buckets))(self._rows)
        self._plan_of = lru_cache(maxsize=2)(self._plan)

    def key(self, position: int) -> tuple[int, int]:
        """(row, epoch of its bucket) of a position."""
        step, offset = divmod(position, self._group)
        epoch = self._epoch(step)
        bucket, number = self._plan_of(epoch)[step - self._groups_before(epoch)]
        own_epoch, place = divmod(number * self._group + offset, len(self.buckets[bucket]))
        return int(self._rows_of(bucket, own_epoch)[place]), own_epoch

    def _groups_before(self, epoch: int) -> int:
        return sum(epoch * len(rows) // self._group for rows in self.buckets)

    def _epoch(self, step: int) -> int:
        """The last epoch that begins at or before a step."""
        rows = sum(map(len, self.buckets))
        low, high = 0, ((step + 1 + len(self.buckets)) * self._group) // rows + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._groups_before(middle) <= step else (low, middle)
        return low

    def _plan(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the group in the bucket's own sequence) of each group of an epoch, shuffled."""
        groups = []
        for bucket, rows in enumerate(self.buckets):
            first, last = (when * len(rows) // self._group for when in (epoch, epoch + 1))
            groups.append([(bucket, number) for number in range(first, last)])
        labels = [bucket for bucket, group in enumerate(groups) for _ in group]
        iterators = [iter(group) for group in groups]
        shuffled = noise.permutation(len(labels), self._seed, f"{self._purpose} buckets", epoch)
        return [next(iterators[labels[place]]) for place in shuffled]  # each bucket's groups in order

    def _rows(self, bucket: int, epoch: int) -> np.ndarray:
        rows = self.buckets[bucket]
        name = f"{self._purpose} order" + (f" {bucket}" if bucket else "")
        return rows[noise.permutation(len(rows), self._seed, name, epoch)]
