"""The optimizers and the learning rate's course."""

import math
import sys

import pytest
import torch
from timm.optim import muon
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.settings.config import Training
from latentdiff.training.optim import learning_rate, optimizer_of


def test_muon_moves_matrices_by_an_orthogonal_step():
    """0.2 sqrt(larger side) times a matrix whose singular values are near 1: the root mean square of Adam's step."""
    torch.manual_seed(0)
    module = nn.Linear(12, 48)
    settings = Training(optimizer="muon", learning_rate=0.01, weight_decay=0)
    optimizer = optimizer_of(module, settings)
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.randn(64, 12, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    weight, bias = (p.detach() - old for p, old in zip(module.parameters(), before, strict=True))
    values = torch.linalg.svdvals(weight) / (0.01 * 0.2 * 48**0.5)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    torch.testing.assert_close(bias.abs(), torch.full_like(bias, 0.01 * (1 + 0.9)), rtol=1e-3, atol=0)  # NAdam's first


def test_muon_moves_words_faster_and_only_those_of_the_captions():
    """By NAdam's first step at five times the rate: a word's row has no gradient in most steps."""
    module = nn.ModuleDict({"token_embedding": nn.Embedding(6, 4), "time_embedding": nn.Linear(4, 4)})
    optimizer = optimizer_of(module, Training(optimizer="muon", learning_rate=0.01, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module["time_embedding"](module["token_embedding"](torch.tensor([1, 4]))).square().sum().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs() for name, p in module.named_parameters()}
    words = moved.pop("token_embedding.weight")
    assert not words[[0, 2, 3, 5]].any()
    torch.testing.assert_close(words[[1, 4]], torch.full((2, 4), 5 * 0.01 * 1.9), rtol=1e-3, atol=0)
    for step in moved.values():
        torch.testing.assert_close(step, torch.full_like(step, 0.01 * 1.9), rtol=1e-3, atol=0)


def test_muon_is_exact_where_bfloat16_is_emulated(monkeypatch):
    """The singular values of its step, of float32, are what the iteration makes of them, to float32's precision."""
    monkeypatch.setattr("latentdiff.training.optim.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", muon.zeropower_via_newtonschulz)  # undone at the end
    module = nn.Linear(12, 12, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = optimizer_of(module, Training(optimizer="muon", learning_rate=0.01, weight_decay=0))
    optimizer_of(module, Training(optimizer="muon"))  # a second one changes nothing
    values = torch.linspace(0.1, 1.2, 12)
    left, right = (torch.linalg.qr(torch.randn(12, 12))[0] for _ in range(2))
    module.weight.grad = left @ values.diag() @ right
    optimizer.step()
    expected = values / values.norm()
    for _ in range(5):  # Jordan's polynomial of each singular value
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    step = -(left.T @ module.weight.detach() @ right.T).diag() / (0.01 * 0.2 * 12**0.5)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_vectors_are_not_decayed():
    module = nn.Linear(8, 8)
    for name in ("adamw", "muon"):
        for group in optimizer_of(module, Training(optimizer=name, weight_decay=0.5)).param_groups:
            assert group["weight_decay"] == (0.5 if group["params"][0] is module.weight else 0)


def test_8_bit_without_its_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"requires bitsandbytes. Install it: pip install 'latentdiff\[8bit\]'"):
        optimizer_of(nn.Linear(2, 2), Training(optimizer="adamw_8bit"))


def rates(schedule, **changes):
    settings = Training(
        max_train_steps=100, lr_warmup_steps=10, learning_rate=2.0, lr_schedule=schedule, lr_decay=0.2, **changes
    )
    return [learning_rate(step, settings) / 2 for step in range(100)]


def test_learning_rate_is_a_trapezoid():
    factors = rates("trapezoid")
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10:81] == pytest.approx([1.0] * 71)
    assert factors[81:] == pytest.approx([i / 20 for i in range(19, 0, -1)])


@pytest.mark.parametrize(
    ("schedule", "course"),
    [
        ("constant", lambda x: 1),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_learning_rate_follows_its_course_after_the_warm_up(schedule, course):
    factors = rates(schedule)
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10:] == pytest.approx([course(i / 90) for i in range(90)])
