"""The average of weights: its recurrence, its closed form, and putting it into the module and back."""

import pytest
import torch
from torch import nn

from latentdiff.training.ema import Ema, constant_decay, power_decay


def averages(decay, count):
    """The average after each of `count` updates, of a weight that was 0 and is n at update n."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema, result = Ema(module, decay), []
    for n in range(1, count + 1):
        nn.init.constant_(module.weight, float(n))
        ema.update(n)
        result.append(float(ema.averaged["weight"]))
    return result


def test_constant_decay_is_its_recurrence():
    """average += (1 - d) (weight - average), d = min(limit, n / (9 + n))."""
    expected, average = [], 0.0
    for n in range(1, 21):
        average += (1 - min(0.5, n / (9 + n))) * (n - average)
        expected.append(average)
    assert averages(constant_decay(0.5), 20) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 6.94])
def test_power_decay_weighs_as_a_power_of_the_step(gamma):
    """Update t of N weighs (t/N)^(g+1) - ((t-1)/N)^(g+1): the integral of t^g over its step, at every N."""
    for count in (1, 7, 50):
        expected = sum(t * ((t / count) ** (gamma + 1) - ((t - 1) / count) ** (gamma + 1)) for t in range(1, count + 1))
        assert averages(power_decay(gamma), count)[-1] == pytest.approx(expected, rel=1e-5)


def test_no_decay_is_no_average():
    assert averages(constant_decay(0.0), 5) == [1, 2, 3, 4, 5]


def test_applied_is_undone_to_the_bit():
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema = Ema(module, constant_decay(0.9))
    for tensor in ema.averaged.values():
        tensor.mul_(0.1)
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(module.weight, ema.averaged["weight"])
        raise KeyError
    assert all(torch.equal(p, own[name]) for name, p in module.named_parameters())


def test_what_is_not_trained_is_not_averaged():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert set(Ema(module, constant_decay(0.9)).averaged) == {"weight"}


def test_offloaded_is_the_same_average():
    """It lies apart from the weights and goes through the same numbers."""
    module = torch.nn.Linear(3, 2)
    near, far = Ema(module, constant_decay(0.9)), Ema(module, constant_decay(0.9), offloaded=True)
    for n in range(1, 4):
        with torch.no_grad():
            module.weight += n
        near.update(n)
        far.update(n)
    for name, tensor in near.averaged.items():
        assert far.averaged[name].device.type == "cpu"
        assert torch.equal(far.averaged[name], tensor)
    own = module.weight.clone()
    with far.applied():
        assert torch.equal(module.weight, near.averaged["weight"])
    assert torch.equal(module.weight, own)
