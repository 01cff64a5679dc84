"""Networks that compare pictures, with random weights in the true formats."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import NoTrainInceptionV3

from latentdiff.core.errors import ModelError, UnsafeError
from latentdiff.evaluation.autoencoder import perceptual
from latentdiff.evaluation.features import named
from latentdiff.formats.tensors import read_tensors
from latentdiff.networks.perception import inception, lpips

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)


def read_as(network, file):
    return network(read_tensors(file), file)


@pytest.fixture(scope="module")
def fid(tmp_path_factory):
    """Random weights under the names of FID's, in both formats."""
    folder = tmp_path_factory.mktemp("inception")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)  # else nothing is left of a picture at the end
        state = network.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "inception.safetensors")
    torch.save(state, folder / "inception.pth")
    return folder


@pytest.mark.slow
def test_inception_as_torchmetrics_has_it(fid):
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(fid / "inception.pth"))
    theirs.use_antialias = False  # published FIDs are of TensorFlow 1's resizing
    pictures = torch.from_numpy(PICTURES.transpose(0, 3, 1, 2).copy())
    wanted = theirs(pictures)
    assert wanted.shape == (3, 2048)
    result = read_as(inception, fid / "inception.safetensors")(pictures)
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))
    assert float((result[0] - result[1]).abs().max()) > 0.01 * float(wanted.max())
    extractor = named(fid / "inception.safetensors")
    assert extractor.name == "Inception v3, pool 2048"
    assert len(extractor.hash) == 64
    np.testing.assert_allclose(extractor.of(PICTURES), result, rtol=1e-3, atol=1e-3 * float(wanted.max()))
    assert np.array_equal(extractor.of(PICTURES[:1]), extractor.of(PICTURES)[:1])


@pytest.mark.parametrize("kind", ["alex", "squeeze"])
def test_lpips_as_torchmetrics_has_it(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = _LPIPS(pretrained=False, net=kind, pnet_rand=True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.startswith("lin"):
                parameter.abs_()  # as trained ones are
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "lpips.safetensors")
    distance = read_as(lpips, tmp_path / "lpips.safetensors")
    other = 255 - PICTURES
    images, others = (torch.from_numpy(each.transpose(0, 3, 1, 2).copy()) / 127.5 - 1 for each in (PICTURES, other))
    np.testing.assert_allclose(
        perceptual(distance, PICTURES, other), theirs(images, others).flatten().numpy(), rtol=1e-4
    )
    assert perceptual(distance, PICTURES, PICTURES).tolist() == [0, 0, 0]
    assert (perceptual(distance, PICTURES, other) > 0).all()
    save_file({k: v for k, v in state.items() if not k.startswith("lins")}, tmp_path / "short.safetensors")
    assert torch.equal(read_as(lpips, tmp_path / "short.safetensors")(images, others), distance(images, others))


def test_what_is_no_such_network(tmp_path, fid):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"not the weights of LPIPS \(.*a\.safetensors\)"):
        read_as(lpips, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"cannot load Inception \(.*a\.safetensors\): "):
        read_as(inception, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="cannot load nothing"):
        read_as(lpips, tmp_path / "nothing.safetensors")
    with pytest.raises(UnsafeError, match="is a pickle file; latentdiff loads safetensors only"):
        named(fid / "inception.pth")
    (tmp_path / "hidden.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafeError, match=r"hidden\.safetensors is a pickle file"):
        read_as(lpips, tmp_path / "hidden.safetensors")
