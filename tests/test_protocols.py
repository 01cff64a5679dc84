"""The contracts of `networks.protocols`, held against every network that claims to keep them."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.arrays import to_numpy
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.codecs.tiny import TinyAutoencoder
from latentdiff.networks.conditions import stacked, together
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.networks.protocols import (
    Backbone,
    Codec,
    DeepFeatures,
    Encoder,
    PerturbedAttention,
    Posterior,
    PreparesConditions,
)

from . import stable_diffusion

PROMPTS = ("a red circle", "two blue squares above a cyan star")
SIZES = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
KINDS = ("own", "own compiled", *(f"Stable Diffusion {family}" for family in stable_diffusion.FAMILIES))


@pytest.fixture(scope="module")
def models(folders, compiled_model):
    """Every kind of model that there is, small."""
    made = {f"Stable Diffusion {family}": stable_diffusion.load(folder).model for family, folder in folders.items()}
    made["own"] = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="torch", device="cpu").model
    made["own compiled"] = LatentDiffusionPipeline.from_pretrained(
        compiled_model, runtime="openvino", torch_dtype="float32"
    ).model
    return made


@pytest.fixture(params=KINDS)
def model(models, request):
    return models[request.param]


def conditions(model, prompts=PROMPTS):
    sizes = SIZES if model.reads_sizes else None
    return stacked([model.encoder.encode(Prompt(prompt, sizes=sizes)) for prompt in prompts]).mapped(model.array)


def noise(model, rows=2):
    rng = np.random.default_rng(0)
    return model.array(rng.standard_normal((rows, *model.codec.shape((64, 64))), dtype=np.float32))


def near(result, expected, tolerance=1e-4):
    result, expected = to_numpy(result), to_numpy(expected)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


# backbones


def test_a_backbone_computes_rows_by_themselves(model):
    """Each row as if it were alone, at times of one number or of each row, float32, the same bits every time."""
    backbone, x, given = model.backbone, noise(model), conditions(model)
    assert isinstance(backbone, Backbone)
    output = backbone.predict(x, 500.0, given)
    assert to_numpy(output).dtype == np.float32
    assert np.array_equal(output, backbone.predict(x, 500.0, given))
    for row in range(2):
        near(
            output[row : row + 1], backbone.predict(x[row : row + 1], 500.0, conditions(model, PROMPTS[row : row + 1]))
        )
    assert np.abs(to_numpy(output - backbone.predict(x, 20.0, given))).max() > 1e-3, "the time matters"
    if model.runtime == "torch":
        near(output, backbone.predict(x, torch.full((2,), 500.0), given))
        assert not output.requires_grad


def test_a_backbone_reads_what_its_spec_says(model):
    spec, given = model.backbone.spec, conditions(model)
    assert set(spec.reads) == set(given.arrays)
    for name, shape in spec.reads.items():
        actual = given[name].shape[1:]
        assert len(actual) == len(shape)
        assert all(want is None or want == have for want, have in zip(shape, actual, strict=True)), name
    assert model.backbone.predict(noise(model), 9.0, given).shape[1] == spec.outputs


def test_several_conditions_are_several_outputs(model):
    backbone, x, given = model.backbone, noise(model), conditions(model)
    other = conditions(model, PROMPTS[::-1])
    both = backbone.predict(x, 500.0, together([given, other]))
    for result, alone in zip(both, (given, other), strict=True):
        near(result, backbone.predict(x, 500.0, alone))


def test_what_a_backbone_can_beside(model):
    """Prepared conditions, deep features of the same step: the same output; perturbed attention: another."""
    backbone, x, given = model.backbone, noise(model), conditions(model)
    output = backbone.predict(x, 500.0, given)
    if isinstance(backbone, PreparesConditions):
        near(backbone.predict(x, 500.0, backbone.prepared(given)), output)
    if isinstance(backbone, DeepFeatures) and backbone.deep_levels:
        first, deep = backbone.predict_from(x, 500.0, given, None)
        near(first, output)
        near(backbone.predict_from(x, 500.0, given, deep)[0], output)
    if isinstance(backbone, PerturbedAttention) and backbone.perturbed_blocks:
        assert np.abs(to_numpy(backbone.predict_perturbed(x, 500.0, given) - output)).max() > 1e-4
    abilities = sum(isinstance(backbone, each) for each in (PreparesConditions, DeepFeatures, PerturbedAttention))
    assert abilities == (1 if model.runtime == "openvino" else 3)


# encoders


def test_an_encoder_reads_chunks(model):
    """The empty prompt is as long as any of one chunk; three chunks are three times as long."""
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    for prompt in ("", *PROMPTS):
        assert encoder.read(prompt, Style()).chunks == 1
        assert len(encoder.encode(Prompt(prompt))["tokens"]) == encoder.length
    long = "red " * (2 * encoder.length)
    reading = encoder.read(long, Style())
    assert (reading.tokens, reading.cut) == (2 * encoder.length + 2, 0)
    assert len(encoder.encode(Prompt(long))["tokens"]) == reading.chunks * encoder.length
    assert len(encoder.encode(Prompt("red", chunks=3))["tokens"]) == 3 * encoder.length
    first, again = (encoder.encode(Prompt(PROMPTS[0])) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first.arrays)


def test_a_trained_encoder_reads_as_the_other(model):
    encoder = model.encoder
    if not hasattr(encoder, "tokenize"):
        assert model.runtime == "openvino", "all of torch's can be trained"
        return
    read = encoder(encoder.tokenize(list(PROMPTS)))
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode(Prompt(prompt))
        assert set(read.arrays) == set(alone.arrays)
        for name, array in alone.arrays.items():
            near(read[name][row].detach(), array)


# codecs


@pytest.fixture(params=[*KINDS, "tiny", "identity"])
def codec(models, request):
    if request.param == "identity":
        return IdentityCodec()
    if request.param == "tiny":
        torch.manual_seed(0)
        config = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        return TinyAutoencoder(AutoencoderTiny(**config, **blocks).eval())
    return models[request.param].codec


def test_a_codec_keeps_its_shapes_and_rows(codec):
    """Pictures of several sizes, each as if it were alone; in pieces and in float32 the same, before and after."""
    assert isinstance(codec, Codec)
    rng = np.random.default_rng(0)
    compiled = not isinstance(codec, torch.nn.Module)
    for size in ((64, 64), (64, 128)):
        values = rng.uniform(-1, 1, (2, codec.image_channels, *size)).astype(np.float32)
        images = values if compiled else torch.from_numpy(values)
        latents = codec.latents_of(images)
        assert tuple(latents.shape) == (2, *codec.shape(size))
        assert codec.shape(size) == (codec.latent_channels, size[0] // codec.factor, size[1] // codec.factor)
        decoded = codec.images_of(latents)
        assert tuple(decoded.shape) == values.shape
        assert {to_numpy(latents).dtype, to_numpy(decoded).dtype} == {np.dtype(np.float32)}
        near(codec.latents_of(images[1:]), latents[1:])
        near(codec.images_of(latents[:1]), decoded[:1])
        with codec.piecewise(tiles=False, slices=True):
            near(codec.images_of(latents), decoded)
        with codec.in_float32():
            near(codec.images_of(latents), decoded)
        assert np.array_equal(codec.images_of(latents), decoded), "as before"


def test_a_posterior_is_around_the_latents(codec):
    if not isinstance(codec, Posterior):
        assert not hasattr(codec, "posterior")
        return
    images = torch.rand(2, codec.image_channels, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, log_variance = codec.posterior(images)
    near(mean, codec.latents_of(images))
    assert log_variance.shape == mean.shape
