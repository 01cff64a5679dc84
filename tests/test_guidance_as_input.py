"""Latent consistency models whose U-Net reads the guidance (Luo et al. 2023): as diffusers draws them, everywhere."""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.consistency import ConsistencyLoss
from latentdiff.diffusion.easy_consistency import EasyConsistencyLoss
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.conditions import Conditions
from latentdiff.settings.finetuning import load_finetuning
from latentdiff.training.consistency import ConsistencyStage

from . import stable_diffusion
from .forked import Started
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load, stored

PROMPT = "a castle"


@pytest.fixture(scope="module")
def theirs():
    """A tiny model in the form of the published ones."""
    made = stable_diffusion.pipeline("1")
    config = {name: value for name, value in made.unet.config.items() if name[0] != "_"} | {"time_cond_proj_dim": 64}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(made.unet.state_dict(), strict=False)
    parts = made.components | {"unet": unet, "scheduler": LCMScheduler.from_config(made.scheduler.config)}
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    place = tmp_path_factory.mktemp("lcm") / "model"
    theirs.save_pretrained(place)
    return place


def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def of_theirs(pipe, **settings):
    """diffusers' latents after one step; further steps would use the global generator, which ours cannot."""
    return pipe(
        PROMPT, num_images_per_prompt=2, latents=noise(), output_type="latent", num_inference_steps=1, **settings
    ).images


def picture_by(pipe, scale):
    """Our own latents of one step."""
    options = {"latents": noise(), "num_images_per_prompt": 2, "output_type": "latent", "num_inference_steps": 1}
    return torch.as_tensor(pipe(PROMPT, guidance_scale=scale, **options).images)


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.5])
def test_as_diffusers_draws(theirs, folder, scale):
    """One step, which adds no noise of its own."""
    expected = of_theirs(theirs, guidance_scale=scale)
    torch.testing.assert_close(picture_by(load(folder), scale), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_changes_the_picture(folder):
    pipe = load(folder)
    options = {"latents": noise(), "num_images_per_prompt": 2, "output_type": "latent"}
    one, other = (torch.as_tensor(pipe(PROMPT, guidance_scale=s, **options).images) for s in (1.0, 8.5))
    assert (one - other).abs().max() > 0.01


def test_a_negative_prompt_without_effect_changes_nothing(folder):
    """However long it is: it requires true_cfg_scale."""
    pipe = load(folder)
    options = {"latents": noise(), "num_images_per_prompt": 2, "output_type": "latent", "num_inference_steps": 1}
    plain, other = (pipe(PROMPT, negative_prompt=text, **options) for text in ("", "dull " * 100))
    assert torch.equal(torch.as_tensor(plain.images), torch.as_tensor(other.images))
    assert any("has no effect" in note for note in other.notes)


def test_the_defaults_are_those_of_its_pipeline(folder):
    defaults = load(folder).card.defaults
    assert {name: defaults[name] for name in ("sampler", "spacing", "num_inference_steps", "guidance_scale")} == {
        "sampler": "lcm",
        "spacing": "distilled",
        "num_inference_steps": 4,
        "guidance_scale": 8.5,
    }


def test_without_a_word_of_guidance_it_is_one(theirs):
    """As fine-tuning trains it."""
    unet, x = UNet(theirs.unet), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = {"tokens": torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(1))}
    silent = unet.predict(x, 501.0, Conditions(conditions))
    one, two = (unet.predict(x, 501.0, Conditions({**conditions, "guidance": torch.full((2,), w)})) for w in (1.0, 2.0))
    assert torch.equal(silent, one)
    assert not torch.equal(silent, two)


def test_saved_folders_load_in_diffusers(folder, theirs, tmp_path):
    load(folder).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["_class_name"] == (
        "LatentConsistencyModelPipeline"
    )
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert type(again) is LatentConsistencyModelPipeline
    assert torch.equal(of_theirs(again, guidance_scale=4.0), of_theirs(theirs, guidance_scale=4.0))


def test_one_file_and_back(folder, call, tmp_path):
    """The layer that reads the guidance has the name of the original code, as ComfyUI reads it."""
    code, _, err = call("convert", folder, tmp_path / "one.safetensors")
    assert code == 0, err
    one, whole = stored(tmp_path / "one.safetensors"), stored(folder)
    assert one.card.defaults == {**whole.card.defaults}
    weights, others = (pipe.model.backbone.model.state_dict() for pipe in (one, whole))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.slow
def test_by_openvino(folder, call, tmp_path):
    """At most one of 255 from torch at each scale, four steps with the same noise."""
    assert call("convert", folder, tmp_path / "compiled", "--to", "openvino")[0] == 0
    compiled = LatentDiffusionPipeline.from_pretrained(
        tmp_path / "compiled", runtime="openvino", torch_dtype=torch.float32
    )
    by_torch = LatentDiffusionPipeline.from_pretrained(folder, device="cpu", runtime="torch")
    for scale in (1.0, 8.5):
        pictures = [
            pipe(PROMPT, seed=3, guidance_scale=scale, height=64, width=64, output_type="uint8").images.astype(int)
            for pipe in (compiled, by_torch)
        ]
        assert abs(pictures[0] - pictures[1]).max() <= 1


# students that read the guidance


def test_the_layer_that_is_added_changes_nothing_yet():
    unet, x = UNet(stable_diffusion.unet("1", tiny=True)), torch.randn(2, 4, 8, 8)
    tokens = torch.randn(2, 77, 64)
    before = unet.predict(x, 501.0, Conditions({"tokens": tokens}))
    unet.add_time_condition("guidance")
    assert unet.spec.reads["guidance"] == ()
    output = unet.predict(x, 501.0, Conditions({"tokens": tokens, "guidance": torch.tensor([3.0, 9.0])}))
    assert torch.equal(output, before)


@pytest.mark.parametrize("objective", ["lcm", "ect"])
def test_the_loss_of_each_scale_is_that_of_its_own(objective):
    """A sample's loss under its scale is the loss of a student whose guidance is that scale."""
    path = VariancePreserving.scaled_linear()

    def loss(guidance):
        if objective == "lcm":
            return ConsistencyLoss(path, "epsilon", steps=10, guidance=guidance, huber=0.001)
        return EasyConsistencyLoss(path, "epsilon", shrink=8, guidance=guidance, huber=0.001)

    def network(slope):
        return lambda x, time, conditions: slope * x + conditions * time[:, None] / 1000

    student, teacher = network(0.3), network(0.4)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 5, generator=generator) for _ in range(2))
    rows = torch.stack([loss(1.0).rows(t) for t in (200, 500, 800)])
    scales, free = torch.tensor([1.0, 2.5, 7.0]), torch.zeros(3, 1)
    cond = torch.ones(3, 1)
    together = loss(1.0)(student, teacher, x0, noise, rows, cond, free, scales)
    for row, scale in enumerate(scales.tolist()):
        alone = loss(scale)(student, teacher, x0, noise, rows, cond, free)
        torch.testing.assert_close(together[row], alone[row])
    assert not torch.isclose(together[1], loss(1.0)(student, teacher, x0, noise, rows, cond, free)[1])


def test_a_student_that_reads_the_guidance(folder_of_teacher, tmp_path):
    """From the command to diffusers: a folder of an LCM, whose new layer has learnt."""
    words = ("--method", "consistency", "--steps", 2, "--train-batch-size", 2, "--lr", 1e-3, "--validation-steps", 2)
    words += ("--set", "previews.count=1", "--set", "previews.num_inference_steps=1", "--resolution", 64)
    words += ("--set", "consistency.guidance_range=[2, 12]")
    code, err = Started("finetune", *folder_of_teacher, "-o", tmp_path / "run", *words).ended()
    assert code == 0, err
    place = tmp_path / "run" / "model"
    theirs = diffusers.DiffusionPipeline.from_pretrained(place)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs) is LatentConsistencyModelPipeline
    assert theirs.unet.time_embedding.cond_proj.weight.abs().max() > 0
    ours = load(place)
    assert ours.card.defaults["guidance_scale"] == 7.5
    for scale in (2.0, 9.0):
        expected = of_theirs(theirs, guidance_scale=scale)
        torch.testing.assert_close(picture_by(ours, scale), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder_of_teacher(tmp_path):
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "teacher")
    as_jsonl(tmp_path / "pictures", some_pictures(4, 64))
    return tmp_path / "teacher", tmp_path / "pictures"


def test_each_sample_has_its_scale():
    """A function of the sample and the epoch, uniform in the range."""
    stage = ConsistencyStage.__new__(ConsistencyStage)
    stage._draws, stage._guidance = SimpleNamespace(seed=4, purpose="training"), (2.0, 12.0)
    scales = np.array([[stage._scale(row, epoch) for row in range(500)] for epoch in range(4)])
    assert stage._scale(7, 2) == scales[2, 7]
    assert len(np.unique(scales)) == scales.size
    assert scales.min() > 2
    assert scales.max() < 12
    assert abs(scales.mean() - 7) < 5 * (10 / 12**0.5) / scales.size**0.5


@pytest.mark.parametrize(
    "settings",
    [{"lora.rank": 4}, {"consistency.guidance": 3}, {"consistency.guidance_range": [9, 2]}, {"method": "full"}],
)
def test_ranges_that_are_refused(settings):
    given = {"method": "consistency", "data.kind": "pictures", "data.pictures.source": "photos"}
    given |= {"consistency.guidance_range": [2, 12], **settings}
    with pytest.raises(ConfigError, match=r"guidance_range|no effect"):
        load_finetuning(None, tuple(given.items()))
