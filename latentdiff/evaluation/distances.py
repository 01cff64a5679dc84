"""How far one set of pictures is from another, by their features (N, E).

frechet            |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)                       Heusel et al. 2017, eq. 6
                   Biased upwards by the finite samples, as 1 / N: only figures of one N compare.
kernel             MMD^2 under (x.y / E + 1)^3, unbiased, may be negative           Binkowski et al. 2018, section 4
cmmd               1000 MMD^2 under exp(-|x - y|^2 / 200) on CLIP's unit embeddings Jayasumana et al. 2024, eq. 4
precision, recall  shares inside the others' balls, each as far as its 3rd nearest Kynkaanniemi et al. 2019, eq. 1
vendi              exp of the entropy of the eigenvalues of K / N: the number of distinct pictures, as it were
                                                                                   Friedman & Dieng 2023, definition 3.1
The arithmetic is torch-fidelity's, in float64.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from latentdiff.diffusion import noise
from latentdiff.evaluation.result import Figure, mean

Array = NDArray[np.floating]
NEIGHBOURS = 3
BLOCKS, LARGEST_BLOCK = 10, 1000
ENOUGH = 4  # pictures for a feature: with fewer the bias does not go as 1 / N yet
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the pictures that the Frechet distance is extrapolated from


def frechet(first: Array, second: Array) -> float:
    """See the module; 0 or more, but for rounding."""
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    made = [fid_features_to_statistics(torch.as_tensor(each, dtype=torch.float64)) for each in (first, second)]
    return float(fid_statistics_to_metric(*made, verbose=False)[KEY_METRIC_FID])


def frechet_extrapolated(first: Array, second: Array, seed: int = 0) -> float:
    """What the Frechet distance goes towards with more pictures: its intercept over 1 / N (Chong & Forsyth 2020)."""
    count = min(len(first), len(second))
    sizes = [int(share * count) for share in SHARES]
    found = []
    for size in sizes:
        chosen = noise.permutation(count, seed, "frechet", size)[:size]  # of both: rows of one caption go together
        found.append(frechet(first[chosen], second[chosen]))
    return float(np.polyfit(1 / np.array(sizes), found, 1)[1])


def kernel(first: Array, second: Array) -> Figure:
    """See the module: the mean over disjoint blocks, whose spread gives its standard error.

    A block stands beside the next one of the others: pictures of the same caption would not be independent.
    """
    count = min(len(first), len(second))
    blocks = max(min(BLOCKS, count // 2), count // LARGEST_BLOCK)
    size = count // blocks  # the estimate is of two sets as large as each other
    starts = size * np.arange(blocks)
    pairs = zip(starts, np.roll(starts, -1), strict=True)
    return mean([_mmd(first[i : i + size], second[j : j + size]) for i, j in pairs], "lower")


def _mmd(first: Array, second: Array) -> float:
    from torch_fidelity.metric_kid import kernel_mmd

    return float(kernel_mmd(first.astype(np.float64), second.astype(np.float64), kid_kernel="poly"))


def cmmd(first: Array, second: Array) -> float:
    """See the module; of as many of each, the estimate with the diagonals, as it is published."""
    from torch_fidelity.metric_kid import kernel_rbf, mmd2

    count = min(len(first), len(second))
    a, b = first[:count].astype(np.float64), second[:count].astype(np.float64)
    products = (kernel_rbf(x, y, kid_kernel_rbf_sigma=10.0) for x, y in ((a, a), (a, b), (b, b)))
    return float(1000 * mmd2(*products, mmd_est="biased"))


def precision_recall(drawn: Array, real: Array) -> tuple[float, float]:
    """Shares of the drawn that could be real, and of the real that could be drawn, in [0, 1]."""
    import torch
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    pair = (torch.as_tensor(each, dtype=torch.float64) for each in (drawn, real))
    precision, recall = calculate_precision_recall_part(*pair, neighborhood=NEIGHBOURS)
    return float(precision), float(recall)


def vendi(features: Array) -> float:
    """See the module; from 1, all alike, to N. Features are made units."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.linalg.svd(units.astype(np.float64), compute_uv=False) ** 2 / len(units)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def equal(pictures: np.ndarray, others: np.ndarray) -> NDArray[np.bool_]:
    """Which are the same to the bit, (N, M)."""
    a, b = (np.array([hashlib.sha256(each.tobytes()).hexdigest() for each in some]) for some in (pictures, others))
    return np.asarray(a[:, None] == b)


def nearest(
    features: Array, others: Array, but: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Of each row the most alike of others, and the cosine with it; but: pairs (N, M) that do not count."""
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (features, others))
    cosines = a @ b.T
    if but is not None:
        cosines[but] = -1
    found = cosines.argmax(1)
    return found, cosines[np.arange(len(a)), found]


def distances(drawn: Array, real: Array, *, unit: bool) -> dict[str, Figure]:
    """All of them, of drawn pictures from real ones; unit: the features are CLIP's unit embeddings."""
    precision, recall = precision_recall(drawn, real)
    figures = {
        "frechet": Figure(frechet(drawn, real), better="lower"),
        "kernel": kernel(drawn, real),
        "precision": Figure(precision, better="higher"),
        "recall": Figure(recall, better="higher"),
    }
    if unit:
        figures["cmmd"] = Figure(cmmd(drawn, real), better="lower")
    if min(len(drawn), len(real)) >= ENOUGH * drawn.shape[1]:
        figures["frechet_extrapolated"] = Figure(frechet_extrapolated(drawn, real), better="lower")
    return figures
