"""The loop: what a step learns from, whatever its split, and when it must not be made."""

import json
import math
import multiprocessing

import pytest
import torch

from latentdiff.core.errors import NonFiniteError, ResourceError
from latentdiff.training.loop import Batching

from .small import LineStage, PictureStage, logged, run


def test_it_learns(tmp_path):
    line = run(tmp_path, max_train_steps=300).module
    assert float(line.weight.detach()) == pytest.approx(2, abs=0.01)
    assert float(line.bias.detach()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("size", "times", "processes"), [(12, 1, 1), (4, 3, 1), (2, 3, 2), (3, 1, 4), (1, 6, 2)])
def test_a_step_takes_the_same_samples_however_it_is_split(size, times, processes):
    batching = Batching(size, times, processes)
    shares = [share for process in range(processes) for share in batching.shares(24, process)]
    assert batching.global_batch == 12
    assert sorted(position for share in shares for position in share) == list(range(24, 36))


def test_accumulation_is_the_larger_batch(tmp_path):
    """Two batches of 4 give the step of one batch of 8."""
    two = run(tmp_path / "two", train_batch_size=4, gradient_accumulation_steps=2).module
    one = run(tmp_path / "one").module
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    alone, helped = (
        run(tmp_path / "0", max_train_steps=10),
        run(tmp_path / "n", max_train_steps=10, num_workers=workers),
    )
    assert all(torch.equal(a, b) for a, b in zip(alone.module.parameters(), helped.module.parameters(), strict=True))


def test_workers_end_with_a_loop_that_fails(tmp_path):
    """They ignore signals; were they left, the end of the program would wait for them for ever."""

    class Faulty(LineStage):
        def loss(self, module, batch):
            raise KeyError("a bug")

    with pytest.raises(KeyError) as caught:
        run(tmp_path, Faulty(), num_workers=1)
    assert not multiprocessing.active_children(), caught


def breaking(value, what):
    """A line whose point 50, of step 7, has a loss or a gradient that is not a number."""

    class Broken(LineStage):
        def loss(self, module, batch):
            self.before = [p.detach().clone() for p in module.parameters()]
            losses = super().loss(module, batch)
            hit = torch.isin(batch["x"].flatten(), torch.randn(1, generator=torch.Generator().manual_seed(50)))
            if hit.any() and what == "loss":
                return losses + torch.where(hit, value, 0.0)
            pole = (module.weight - module.weight.detach()).abs().sqrt().sum()  # 0, of infinite slope
            return losses + pole if hit.any() else losses

    return Broken()


@pytest.mark.parametrize(("value", "what"), [(math.nan, "loss"), (math.inf, "loss"), (0, "gradient")])
def test_what_is_not_finite_stops_before_the_step(tmp_path, value, what):
    """Step 7 is samples 48 to 55: named are those whose loss is not finite, or all where only the gradient is."""
    stage = breaking(value, what)
    named = "point 50" if what == "loss" else "point 48, point 49, point 50, point 51, point 52, ... 8 in all"
    with pytest.raises(NonFiniteError) as stopped:
        run(tmp_path, stage, checkpointing_steps=3)
    assert str(stopped.value) == f"{what} is not finite at step 7 (samples {named}). The weights were not changed"
    assert all(torch.equal(a, b) for a, b in zip(stage.before, stage.module.parameters(), strict=True))
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
    report = json.loads((tmp_path / "non-finite.json").read_text())
    assert report["samples"] == (["point 50"] if what == "loss" else [f"point {n}" for n in range(48, 56)])


def out_of_memory(above, stage=PictureStage):
    """Memory that ends where more than `above` samples go through the network at once, in the backward pass."""

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if len(grad) > above:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return grad

    class Large(stage):
        seen = ()

        def loss(self, module, batch):
            self.seen = (*self.seen, tuple(batch["x"][:, 0].tolist()))
            return Full.apply(super().loss(module, batch))

    return Large()


def test_out_of_memory_halves_the_micro_batch(tmp_path, capsys):
    """The same samples are taken again, in parts, and the result is that of the whole batch up to rounding."""
    stage = out_of_memory(above=2)
    run(tmp_path / "parts", stage, max_train_steps=12)
    assert "micro-batch 8 -> 2 after out of memory\n" in capsys.readouterr().err
    assert [len(part) for part in stage.seen[:6]] == [8, 4, 2, 2, 2, 2]
    assert stage.seen[0] == sum(stage.seen[2:6], ())
    assert {len(part) for part in stage.seen[2:]} == {2}, "later steps begin with what fits"
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["micro_batch"] == 2, "and so does a resumed run"
    whole = run(tmp_path / "whole", PictureStage(), max_train_steps=12)
    for a, b in zip(stage.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in logged(tmp_path / name) if "loss" in row] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_resumed_batch_is_as_large_as_its_settings(tmp_path):
    """A smaller one of the checkpoint counts only if memory had run out: a contrastive loss must not be split."""
    run(tmp_path, PictureStage(), max_train_steps=10, train_batch_size=4, gradient_accumulation_steps=2)
    stage = out_of_memory(above=8)
    run(tmp_path, stage, checkpoint=tmp_path / "checkpoints" / "step-00000010", max_train_steps=12)
    assert {len(part) for part in stage.seen} == {8}


def test_nothing_left_to_halve(tmp_path):
    with pytest.raises(ResourceError, match=r"out of memory at step 1 with micro-batch 1\. Use a smaller"):
        run(tmp_path / "one", out_of_memory(above=0))
    whole = out_of_memory(above=4)
    whole.divisible = False
    with pytest.raises(ResourceError, match="out of memory at step 1 with micro-batch 8"):
        run(tmp_path / "whole", whole)


def test_another_error_is_not_taken_for_the_end_of_memory(tmp_path):
    class Faulty(LineStage):
        def loss(self, module, batch):
            return super().loss(module, {**batch, "x": batch["x"][:, :0]})

    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, Faulty())
