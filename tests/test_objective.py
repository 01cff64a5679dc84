"""The objective: weights against closed forms, and the loss against its definition."""

import numpy as np
import pytest
import torch

from latentdiff.diffusion.objective import WEIGHTINGS, DiffusionLoss, weights
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS
from latentdiff.diffusion.path import VariancePreserving

SD = VariancePreserving.scaled_linear()
SNR = SD.alphas_cumprod / (1 - SD.alphas_cumprod)


def test_min_snr_clips_the_first_147_times():
    w = weights(SD, "epsilon", "min_snr")
    assert np.flatnonzero(w < 1).tolist() == list(range(147))


def test_min_snr_means():
    """Mean over t of min(SNR, 5) / SNR for epsilon and min(SNR, 5) / (SNR + 1) for v."""
    assert weights(SD, "epsilon", "min_snr").mean() == pytest.approx(0.9165708, rel=1e-6)
    assert weights(SD, "v_prediction", "min_snr").mean() == pytest.approx(0.2943305, rel=1e-6)
    np.testing.assert_allclose(weights(SD, "sample", "min_snr"), np.minimum(SNR, 5), rtol=1e-12)


def test_other_weightings():
    np.testing.assert_allclose(weights(SD, "sample", "soft_min_snr"), 5 * SNR / (SNR + 5), rtol=1e-12)
    np.testing.assert_allclose(weights(SD, "epsilon", "p2"), 1 / (1 + SNR), rtol=1e-12)
    np.testing.assert_array_equal(weights(SD, "v_prediction", "uniform"), 1)


def test_gamma():
    """Of each weighting its own parameter, in place of 5 and 1."""
    np.testing.assert_allclose(weights(SD, "sample", "min_snr", 3.0), np.minimum(SNR, 3), rtol=1e-12)
    np.testing.assert_allclose(weights(SD, "sample", "soft_min_snr", 3.0), 3 * SNR / (SNR + 3), rtol=1e-12)
    np.testing.assert_allclose(weights(SD, "epsilon", "p2", 2.0), (1 + SNR) ** -2, rtol=1e-12)
    x0, noise, wrong = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([5, 150, 500, 990])
    loss = DiffusionLoss(SD, "sample", "min_snr", 2.0)(lambda *_: wrong, x0, noise, t, None)
    expected = torch.from_numpy(np.minimum(SNR, 2))[t] * ((wrong - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_finite_at_zero_snr(weighting, prediction):
    w = weights(SD.zero_terminal_snr(), prediction, weighting)
    assert np.isfinite(w).all()
    assert (w >= 0).all()


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "p2"])
def test_weighting_means_the_same_for_every_prediction(weighting):
    """The same wrong x0, stated as epsilon, v or x0, costs the same."""
    x0, noise, wrong = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([5, 150, 500, 990])
    alpha = torch.from_numpy(np.sqrt(SD.alphas_cumprod))[t][:, None, None, None]
    sigma = torch.from_numpy(np.sqrt(1 - SD.alphas_cumprod))[t][:, None, None, None]

    def network(prediction):
        def predict(x, t, context):
            if prediction == "karras":  # Karras et al. 2022, table 1: x0 = skip y + out F of y = x_t / alpha
                ratio, y = sigma / alpha, x * (sigma**2 + alpha**2 / 4) ** 0.5 / alpha
                return (wrong - 0.25 / (ratio**2 + 0.25) * y) / (0.5 * ratio / (ratio**2 + 0.25) ** 0.5)
            eps = (x - alpha * wrong) / sigma
            v = alpha * eps - sigma * wrong
            return {"sample": wrong, "epsilon": eps, "v_prediction": v, "flow": eps - wrong}[prediction]

        return predict

    first, *others = (DiffusionLoss(SD, p, weighting)(network(p), x0, noise, t, None) for p in PARAMETRIZATIONS)
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-9)


def test_simple_loss_is_ho_s():
    """Ho et al. 2020, eq. 14: |noise - eps(sqrt(a) x0 + sqrt(1 - a) noise, t)|^2, here with eps = x_t."""
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    a = torch.from_numpy(SD.alphas_cumprod)[t].float()[:, None, None, None]
    expected = ((noise - (a.sqrt() * x0 + (1 - a).sqrt() * noise)) ** 2).mean((1, 2, 3))
    loss = DiffusionLoss(SD, "epsilon")(lambda x, t, context: x, x0, noise, t, None)
    torch.testing.assert_close(loss, expected)
