"""Batches made ahead of the step that needs them, by worker processes or none: the same batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.core.errors import LatentDiffError
from latentdiff.training.interruption import leave_signals_to_the_parent

Batch = dict[str, Tensor]


class _Shares(Dataset[Batch | LatentDiffError]):
    """A batch by the positions of its samples."""

    def __init__(self, batch: Callable[[range], Batch]):
        self._batch = batch

    def __getitem__(self, positions: range) -> Batch | LatentDiffError:
        try:
            return self._batch(positions)
        except LatentDiffError as error:  # raised here it would come out of a worker as a traceback of its own
            return error


def batches_of(
    batch: Callable[[range], Batch], shares: Iterable[range], workers: int, device: torch.device
) -> Generator[Batch]:
    """`batch(share)` for every share, in order, pinned where a GPU will read it. Close it to end its workers."""
    loader: DataLoader[Batch | LatentDiffError] = DataLoader(
        _Shares(batch),
        batch_size=None,  # a share is a whole batch
        sampler=shares,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # the set is shared, not sent
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # else every epoch would draw a seed, which nothing here uses, from the global one
    )
    batches = iter(loader)
    try:
        for made in batches:
            if isinstance(made, LatentDiffError):
                raise made
            yield made
    finally:  # at once: workers ignore signals, and the end of the program would wait for them
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
