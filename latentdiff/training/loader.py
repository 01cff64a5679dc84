"""Batches prepared ahead of their step by worker processes, or without any: the batches are the same."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.core.errors import LatentDiffError
from latentdiff.training.interruption import leave_signals_to_the_parent

Batch = dict[str, Tensor]


class _Shares(Dataset[Batch | LatentDiffError]):
    """Batches by the positions of their samples."""

    def __init__(self, batch: Callable[[range], Batch]):
        self._batch = batch

    def __getitem__(self, positions: range) -> Batch | LatentDiffError:
        try:
            return self._batch(positions)
        except LatentDiffError as error:  # raised in a worker it would become a traceback
            return error


def batches_of(
    batch: Callable[[range], Batch], shares: Iterable[range], workers: int, device: torch.device
) -> Generator[Batch]:
    """`batch(share)` for every share, in order, in pinned memory for a GPU. Close it to end its workers."""
    loader: DataLoader[Batch | LatentDiffError] = DataLoader(
        _Shares(batch),
        batch_size=None,  # a share is already a batch
        sampler=shares,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # forked workers share the set
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # or every epoch draws a seed from the global generator
    )
    batches = iter(loader)
    try:
        for made in batches:
            if isinstance(made, LatentDiffError):
                raise made
            yield made
    finally:  # workers ignore signals, and the program's end would wait for them
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
