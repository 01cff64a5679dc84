"""Distances between two sets of pictures, by their features (N, E).

frechet            |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)                       Heusel et al. 2017, eq. 6
                   Biased upwards, in proportion to 1 / N: compare only figures of equal N.
kernel             MMD^2 under (x.y / E + 1)^3, unbiased, may be negative           Binkowski et al. 2018, section 4
cmmd               1000 MMD^2 under exp(-|x - y|^2 / 200) on CLIP's unit embeddings Jayasumana et al. 2024, eq. 4
precision, recall  shares inside the others' balls, each as far as its 3rd nearest Kynkaanniemi et al. 2019, eq. 1
vendi              exp of the entropy of the eigenvalues of K / N: an effective number of distinct pictures
                                                                                   Friedman & Dieng 2023, definition 3.1
The arithmetic is torch-fidelity's or torch's, in float64; standard errors are the jackknife's. Values of all pairs of
rows are computed in parts, so that 50,000 pictures fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentdiff.diffusion import noise
from latentdiff.evaluation.jackknife import PARTS, jackknife, jackknifed, parts
from latentdiff.evaluation.result import Figure

Array = NDArray[np.floating]
NEIGHBOURS = 3
BLOCKS, LARGEST_BLOCK = 10, 1000
ENOUGH = 4  # pictures for each feature: with fewer the bias is not proportional to 1 / N
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the pictures from which the Frechet distance is extrapolated
AT_ONCE = 1000  # rows
OFTEN = 5_000  # pictures; above, statistics of all pairs are computed once, without an error


def frechet(first: Array, second: Array) -> float:
    """The Frechet distance; see the module. 0 or more, up to rounding."""
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    made = [fid_features_to_statistics(torch.as_tensor(each, dtype=torch.float64)) for each in (first, second)]
    return float(fid_statistics_to_metric(*made, verbose=False)[KEY_METRIC_FID])


def frechet_extrapolated(first: Array, second: Array, seed: int = 0) -> float:
    """The limit of the Frechet distance for many pictures: its intercept over 1 / N (Chong & Forsyth 2020)."""
    count = min(len(first), len(second))
    sizes = [int(share * count) for share in SHARES]
    distances = []
    for size in sizes:
        chosen = noise.permutation(count, seed, "frechet", size)[:size]  # paired rows
        distances.append(frechet(first[chosen], second[chosen]))
    return float(np.polyfit(1 / np.array(sizes), distances, 1)[1])


def kernel(first: Array, second: Array) -> float:
    """The kernel distance, the mean over disjoint blocks; see the module.

    A block is compared with the next block of the other set: pictures of one caption would not be independent.
    """
    count = min(len(first), len(second))
    blocks = max(min(BLOCKS, count // 2), count // LARGEST_BLOCK)
    size = count // blocks  # the estimate requires sets of equal size
    starts = size * np.arange(blocks)
    pairs = zip(starts, np.roll(starts, -1), strict=True)
    return float(np.mean([_mmd(first[i : i + size], second[j : j + size]) for i, j in pairs]))


def _mmd(first: Array, second: Array) -> float:
    from torch_fidelity.metric_kid import kernel_mmd

    return float(kernel_mmd(first.astype(np.float64), second.astype(np.float64), kid_kernel="poly"))


def cmmd(first: Array, second: Array) -> Figure:
    """CMMD, see the module, of equal numbers of pictures, by the published estimate, which includes the diagonals."""
    count = min(len(first), len(second))
    cut = parts(count, min(PARTS, count))
    sizes = np.array([part.stop - part.start for part in cut])
    sums = [_kernel_sums(*pair, cut) for pair in ((first, first), (second, second), (first, second))]

    def of(kept: NDArray[np.bool_]) -> float:
        a, b, both = (float(each[kept][:, kept].sum()) for each in sums)
        return 1000 * (a + b - 2 * both) / float(sizes[kept].sum()) ** 2

    every = np.arange(len(cut))
    return jackknifed(of(every >= 0), [of(every != part) for part in every], "lower")


def _kernel_sums(first: Array, second: Array, cut: Sequence[slice]) -> NDArray[np.float64]:
    """The kernel's sums over every part of one set with every part of the other."""
    from torch_fidelity.metric_kid import kernel_rbf

    sums = np.zeros((len(cut), len(cut)))
    for i, rows in enumerate(cut):
        for start in range(rows.start, rows.stop, AT_ONCE):
            some = first[start : min(start + AT_ONCE, rows.stop)].astype(np.float64)
            sums[i] += [
                kernel_rbf(some, second[other].astype(np.float64), kid_kernel_rbf_sigma=10.0).sum() for other in cut
            ]
    return sums


def inside(points: Array, others: Array) -> float:
    """The share of points inside a ball around one of the others: precision of drawn pictures, recall of real ones."""
    import torch

    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (points, others))
    radii = torch.cat([torch.cdist(some, b).kthvalue(NEIGHBOURS + 1).values for some in torch.split(b, AT_ONCE)])
    matches = torch.cat([(torch.cdist(some, b) <= radii).any(1) for some in torch.split(a, AT_ONCE)])
    return float(matches.double().mean())


def vendi(features: Array) -> float:
    """The Vendi score, see the module, from 1 (all alike) to N. Features are normalised first."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.linalg.svd(units.astype(np.float64), compute_uv=False) ** 2 / len(units)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def nearest(
    features: Array, others: Array, but: tuple[NDArray[np.str_], NDArray[np.str_]] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """The nearest of the others for each row, and their cosine.

    but: names of the rows (N,) and of the others (M,); others with the row's own name do not count.
    """
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (features, others))
    matches, cosines = [], []
    for start in range(0, len(a), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        alike = a[rows] @ b.T
        if but is not None:
            alike[but[0][rows, None] == but[1]] = -1
        matches.append(alike.argmax(1))
        cosines.append(alike.max(1))
    return np.concatenate(matches), np.concatenate(cosines)


def distances(fake: Array, real: Array, *, unit: bool) -> dict[str, Figure]:
    """All distances of drawn pictures from real ones; unit: the features are CLIP's unit embeddings."""
    figures = {
        "frechet": jackknife(frechet, fake, real, better="lower"),
        "kernel": jackknife(kernel, fake, real, better="lower"),
        "precision": jackknife(inside, fake, real, better="higher", often=OFTEN),
        "recall": jackknife(inside, real, fake, better="higher", often=OFTEN),
    }
    if unit:
        figures["cmmd"] = cmmd(fake, real)
    if min(len(fake), len(real)) >= ENOUGH * fake.shape[1]:
        figures["frechet_extrapolated"] = jackknife(frechet_extrapolated, fake, real, better="lower", often=OFTEN)
    return figures
