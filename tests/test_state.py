"""What a run has learnt, gathered and put back: in every layout, and from shards on several processes."""

import pytest
import torch
from torch import nn

from latentdiff.settings.config import Training
from latentdiff.training import state
from latentdiff.training.ema import Ema, constant_decay
from latentdiff.training.optim import optimizer_of
from latentdiff.training.state import Trained, restore, size, unshard

from . import forked


def network(shard=None):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(8, 72), nn.Unflatten(1, (8, 3, 3)), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(16, 8)
    )
    if shard:
        shard(module[0])
        shard(module)
    else:
        module.to(memory_format=torch.channels_last)
    return module


class Counting(torch.optim.Optimizer):
    """Notes numbers of Python beside its tensors, as 8-bit AdamW does."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["scale"] = state.get("scale", 1.0) * 0.9
            parameter.sub_(parameter.grad, alpha=state["scale"] / state["step"])


def trained_by(module, name="adamw"):
    if name == "plain":
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    elif name == "counting":
        optimizer = Counting(module.parameters(), lr=0.01)
    else:
        optimizer = optimizer_of(module, Training(optimizer=name, learning_rate=0.01))
    return Trained({"network": module}, Ema(module, constant_decay(0.9)), optimizer)


def gather(trained):
    """Copies, to be kept over later steps."""
    result = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in state.gather(trained)}
    assert size(trained) == sum(tensor.nbytes for tensors in result.values() for tensor in tensors.values())
    return result


def make_steps(trained, steps, rank=0):
    module = trained.parts["network"]
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        (module(x) - x.flip(1)).square().mean().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.ema.update(step)


def differing(one, other):
    assert {part: set(tensors) for part, tensors in one.items()} == {part: set(t) for part, t in other.items()}
    return [f"{part} {name}" for part, t in one.items() for name in t if not torch.equal(t[name], other[part][name])]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "plain", "counting"])
def test_restored_in_the_middle(optimizer):
    """In channels_last too, where a fused optimizer reads a state of another order wrongly and in silence."""
    whole = trained_by(network(), optimizer)
    make_steps(whole, range(1, 4))
    saved = gather(whole)
    assert all(tensor.is_contiguous() for part in saved.values() for tensor in part.values())
    make_steps(whole, range(4, 9))
    parts = trained_by(network(), optimizer)
    restore(parts, saved)
    assert differing(gather(parts), saved) == []
    make_steps(parts, range(4, 9))
    assert differing(gather(parts), gather(whole)) == []


def _sharded(rank, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    whole, parts = (trained_by(network(lambda m: fully_shard(m, mesh=mesh)), "plain") for _ in range(2))
    make_steps(whole, range(1, 4), rank)
    saved = gather(whole)
    restore(parts, saved)
    for trained in (whole, parts):
        make_steps(trained, range(4, 7), rank)
    ends = gather(whole), gather(parts)
    parts.ema.apply()
    unshard(parts.parts["network"])
    exported = {name: tensor.clone() for name, tensor in parts.parts["network"].state_dict().items()}
    torch.save((saved, *ends, exported), f"{path}-{rank}")


def test_shards_are_gathered_and_scattered(tmp_path):
    """FSDP2 on two processes, to the bit: a checkpoint has whole tensors, and what is exported is whole too."""
    forked.in_two_processes(_sharded, tmp_path / "out")
    outs = [torch.load(tmp_path / f"out-{rank}", weights_only=True) for rank in range(2)]
    for saved, whole, parts, exported in outs:
        assert differing(whole, parts) == []
        assert saved["network"]["0.weight"].shape == (72, 8)
        assert all(torch.equal(exported[name], tensor) for name, tensor in parts["ema"].items())
    assert differing(outs[0][1], outs[1][1]) == []
    assert differing(outs[0][0], outs[0][1]) != []
