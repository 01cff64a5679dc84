"""Keyed randomness: a function of its key, with the moments of its distribution."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from latentdiff.diffusion import noise


def test_same_key_same_draws_in_another_process():
    code = "from latentdiff.diffusion import noise; print(noise.normal((3,), 5, 'a', 7, 9).tobytes().hex())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == noise.normal((3,), 5, "a", 7, 9).tobytes().hex()


def test_every_part_of_the_key_matters():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (2**64 - 1, "a", 0, 0)]
    draws = [tuple(noise.normal((4,), *key)) for key in keys]
    assert len(set(draws)) == len(keys)


def test_neighbouring_keys_do_not_overlap():
    """10,000 draws of one key share no value with those of the next index and step."""
    streams = [noise.generator(3, "a", *key).integers(2**63, size=10_000) for key in ((0, 0), (1, 0), (0, 1))]
    assert len(np.unique(np.concatenate(streams))) == 30_000


def test_standard_normal():
    draws = noise.normal((200_000,), 0, "a")
    assert draws.dtype == np.float32
    assert stats.kstest(draws, "norm").pvalue > 0.01


def test_draws_across_keys_are_uncorrelated():
    draws = np.stack([noise.normal((1000,), seed, "initial latents") for seed in range(100)])
    correlations = np.corrcoef(draws)[np.triu_indices(100, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(1000)


def test_permutation():
    first, second = noise.permutation(1000, 0, "order", 0), noise.permutation(1000, 0, "order", 1)
    assert sorted(first) == list(range(1000))
    assert (first != second).any()
    np.testing.assert_array_equal(first, noise.permutation(1000, 0, "order", 0))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(OverflowError, match=r"out of bounds|too large"):
        noise.generator(seed, "a")
