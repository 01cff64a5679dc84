"""Networks in the CPU's memory: what is on the device at once, and the same pictures for every family."""

from importlib import import_module

import diffusers
import pytest
import torch
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.runtime import device
from latentdiff.runtime.offload import networks_in

from . import flux
from .stable_diffusion import load
from .test_flow_adapters import MAKERS
from .test_parts import FLUX_DEV

GENERATE = import_module("latentdiff.cli.generate")
OPTIONS = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}


@pytest.mark.parametrize("family", MAKERS)
def test_every_network_is_moved_and_draws_the_same(family, tmp_path):
    """The CPU stands for the device. The text encoders come first, the VAE last."""
    MAKERS[family]().save_pretrained(tmp_path)
    plain = load(tmp_path)
    modules = [module for module, _ in networks_in(plain.model)]
    assert {*map(id, modules)} == {id(part) for part in plain.model.parts.values() if isinstance(part, nn.Module)}
    assert [is_backbone for _, is_backbone in networks_in(plain.model)] == [False] * (len(modules) - 2) + [True, False]
    assert modules[-1] is plain.model.parts["vae"]
    expected = plain("a castle", **OPTIONS).images
    for unit in ("blocks", "layers"):
        other = LatentDiffusionPipeline.from_pretrained(tmp_path, device="cpu").offload("cpu", **{unit: True})
        assert torch.equal(other("a castle", **OPTIONS).images, expected)


@pytest.mark.parametrize("first", [{"blocks": True}, {"layers": True}, {}])
def test_once_only(first, tmp_path):
    flux.pipeline().save_pretrained(tmp_path)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path, device="cpu").offload("cpu", **first)
    with pytest.raises(ConfigError, match="offloaded already"):
        pipe.offload("cpu", layers=True)
    with pytest.raises(ConfigError, match="blocks or layers, not both"):
        pipe.offload("cpu", layers=True, blocks=True)


@pytest.mark.parametrize(
    ("value", "layers", "blocks"), [("model", False, False), ("sequential", True, False), ("block", False, True)]
)
def test_by_the_command_line(call, tiny_model, monkeypatch, value, layers, blocks):
    """The model is loaded where it stays: one that is larger than the GPU would not fit there."""
    loaded, devices, units = GENERATE.loaded, [], []
    monkeypatch.setattr(GENERATE, "loaded", lambda *given: devices.append(given[1]) or loaded(*given))
    monkeypatch.setattr(device, "usable_device", lambda name: torch.device("cpu" if str(name) == "cpu" else "cuda:1"))

    def offload(self, to, **unit):
        devices.append((self.device, to))
        units.append(unit)

    monkeypatch.setattr(LatentDiffusionPipeline, "offload", offload)
    words = ("--offload", value, "--device", "cuda:1", "--steps", 1, "-s", 1)
    code, _, err = call("generate", "a ring", "-m", tiny_model, *words)
    assert code == 0, err
    assert devices == ["cpu", (torch.device("cpu"), torch.device("cuda:1"))]
    assert units == [{"layers": layers, "blocks": blocks}]


def weight_bytes(module):
    return sum(2 * parameter.numel() for parameter in module.parameters())


def test_a_model_of_twelve_billions_fits_eight_gigabytes():
    """Two blocks of it in 16 bits, and what is in no block."""
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel.from_config(FLUX_DEV)
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
    assert len(blocks) == FLUX_DEV["num_layers"] + FLUX_DEV["num_single_layers"]
    assert weight_bytes(network) > 23e9
    largest = max(map(weight_bytes, blocks))
    rest = weight_bytes(network) - sum(map(weight_bytes, blocks))
    assert 2 * largest + rest < 1.5e9
