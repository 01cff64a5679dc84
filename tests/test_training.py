"""Training: the loop against plain arithmetic, resume, keyed batches, and the chain on the command line."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from latentdiff import build, stages
from latentdiff.config import Training, load_config
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ConfigError, DataError, ModelError, NonFiniteError
from latentdiff.models.weights import load_autoencoder, load_text_encoder
from latentdiff.training.checkpoint import checkpoints
from latentdiff.training.denoiser import ConditionedNetwork, DenoiserStage, LatentSet
from latentdiff.training.ema import ema_of
from latentdiff.training.optim import optimizer_of, trapezoid
from latentdiff.training.run import run_stage

from .conftest import ROOT


class LineStage:
    """y = 2 x + 1 from noisy batches, each a function of its number."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Linear(1, 1)

    def batch(self, index):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(index))
        return x, 2 * x + 1

    def loss(self, module, batch):
        return ((module(batch[0]) - batch[1]) ** 2).mean()


SETTINGS = Training(
    max_train_steps=40, learning_rate=0.1, lr_warmup_steps=5, weight_decay=0, checkpointing_steps=10, ema_decay=0.9
)


def run(directory, stage=None, report=None, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return run_stage(Accelerator(cpu=True), stage or LineStage(), settings, directory, report)


def weights(directory):
    return load_file(checkpoints(directory / "checkpoints")[-1] / "ema.safetensors")


def logged(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path):
    averaged = run(tmp_path, max_train_steps=300)
    assert float(averaged.weight.detach()) == pytest.approx(2, abs=0.01)
    assert float(averaged.bias.detach()) == pytest.approx(1, abs=0.01)


class KilledError(Exception):
    pass


class PictureStage:
    """A convolution between two matrices: every kind of parameter that an optimizer treats in its own way."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 1), nn.Flatten())

    def batch(self, index):
        return torch.randn(8, 8, generator=torch.Generator().manual_seed(index))

    def loss(self, module, batch):
        return ((module(batch) - batch.flip(1)) ** 2).mean()


@pytest.mark.parametrize(("stage", "optimizer"), [(LineStage, "adamw"), (PictureStage, "muon")])
def test_stopped_and_resumed_is_bitwise_the_same(tmp_path, stage, optimizer):
    run(tmp_path / "whole", stage(), optimizer=optimizer)

    class Stopping(stage):
        def batch(self, index):
            if index == 25:
                raise KilledError
            return super().batch(index)

    with pytest.raises(KilledError):
        run(tmp_path / "parts", Stopping(), optimizer=optimizer)
    run(tmp_path / "parts", stage(), optimizer=optimizer)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    parts, whole = logged(tmp_path / "parts"), logged(tmp_path / "whole")
    assert [row["step"] for row in parts] == list(range(1, 41))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert [path.name for path in checkpoints(tmp_path / "parts" / "checkpoints")] == ["step-00000030", "step-00000040"]


def test_accumulation_is_the_larger_batch(tmp_path):
    """Two micro-batches of 8 give the step of one batch of 16."""

    class Wide(LineStage):
        def batch(self, index):
            parts = [super(Wide, self).batch(2 * index + i) for i in range(2)]
            return tuple(torch.cat(side) for side in zip(*parts, strict=True))

    run(tmp_path / "two", gradient_accumulation_steps=2)
    run(tmp_path / "one", Wide())
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_before_the_step(tmp_path, value):
    class Broken(LineStage):
        def loss(self, module, batch):
            loss = super().loss(module, batch)
            Broken.before = [p.detach().clone() for p in module.parameters()]
            Broken.calls = getattr(Broken, "calls", 0) + 1
            return loss * value if Broken.calls == 7 else loss

    stage = Broken()
    Broken.calls = 0
    with pytest.raises(NonFiniteError, match="not finite at step 7"):
        run(tmp_path, stage)
    assert all(torch.equal(a, b) for a, b in zip(Broken.before, stage.module.parameters(), strict=True))


def test_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path)
    path = checkpoints(tmp_path / "checkpoints")[-1] / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"step-00000040 cannot be read"):
        run(tmp_path)


def test_ema_is_its_recurrence():
    """average += (1 - d) (weight - average), d = min(decay, (1 + n) / (10 + n)), from the first update's copy."""
    module = nn.Linear(1, 1, bias=False)
    ema = ema_of(module, 0.5)
    expected = None
    for n in range(20):
        with torch.no_grad():
            module.weight.fill_(float(n))
        ema.update_parameters(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n) if n == 0 else expected + (1 - decay) * (n - expected)
    assert float(ema.module.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_muon_moves_matrices_by_an_orthogonal_step():
    """0.2 sqrt(larger side) times a matrix whose singular values are near 1: the root mean square of Adam's step."""
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


def test_vectors_are_not_decayed():
    module = nn.Linear(8, 8)
    for name in ("adamw", "muon"):
        for group in optimizer_of(module, Training(optimizer=name, weight_decay=0.5)).param_groups:
            assert group["weight_decay"] == (0.5 if group["params"][0] is module.weight else 0)


def test_learning_rate_is_a_trapezoid():
    factors = [trapezoid(step, 100, 10, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors[10:81] == pytest.approx([1.0] * 71)
    assert factors[81:] == pytest.approx([i / 20 for i in range(19, 0, -1)])


def denoiser_stage(batch_size, tune=False):
    generator = torch.Generator().manual_seed(0)
    latents = LatentSet(
        torch.randn(10, 4, 2, 2, generator=generator).half(),
        torch.full((10, 4, 2, 2), -2.0).half(),
        torch.arange(10)[:, None].expand(-1, 3),
    )
    return DenoiserStage(
        ConditionedNetwork(nn.Identity(), nn.Embedding(20, 4), tune),
        DiffusionLoss(NoiseSchedule.scaled_linear(), "epsilon"),
        latents,
        torch.full((1, 3), 19),
        seed=0,
        batch_size=batch_size,
        timesteps=1000,
        caption_dropout=0.25,
        device=torch.device("cpu"),
    )


def test_batches_do_not_depend_on_their_size():
    """The same samples with the same noise, times and dropped captions, in the same order."""
    wide = denoiser_stage(6).batch(2)
    narrow = [denoiser_stage(3).batch(index) for index in (4, 5)]
    for part, halves in zip(wide, zip(*narrow, strict=True), strict=True):
        assert torch.equal(part, torch.cat(halves))


def test_every_sample_once_an_epoch_with_new_noise():
    stage = denoiser_stage(5)
    epochs = [[stage.draws(2 * epoch + half) for half in range(2)] for epoch in range(2)]
    rows = [torch.cat([draws.rows for draws in epoch]).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in rows)
    assert rows[0] != rows[1]
    noise = [
        torch.cat([draws.noise for draws in epoch])[np.argsort(order)]
        for epoch, order in zip(epochs, rows, strict=True)
    ]
    assert not torch.isclose(noise[0], noise[1]).any()


def test_caption_dropout_has_its_rate():
    stage = denoiser_stage(500)
    ids = stage.batch(0)[3]
    assert float((ids == 19).all(1).float().mean()) == pytest.approx(0.25, abs=0.06)


def test_posterior_is_sampled():
    stage = denoiser_stage(400)
    draws, (x0, *_) = stage.draws(0), stage.batch(0)
    residual = x0 - stage._latents.mean[draws.rows].float()
    assert float(residual.std()) == pytest.approx(np.exp(-1), rel=0.05)


@pytest.mark.parametrize("tune", [False, True])
def test_text_encoder_is_trained_by_choice(tune):
    network = ConditionedNetwork(
        nn.Linear(2, 2), nn.ModuleDict({"token_embedding": nn.Linear(2, 2), "layer": nn.Linear(2, 2)}), tune
    )
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"unet.weight", "unet.bias"} | (
        {"text_encoder.layer.weight", "text_encoder.layer.bias"} if tune else set()
    )


def test_the_whole_chain(tiny_run):
    """configs/scenes-tiny.toml from nothing: every stage's loss falls, previews and a loadable model are written."""
    for stage, steps in (("autoencoder", 60), ("clip", 40), ("denoiser", 40)):
        lines = logged(tiny_run / stage)
        rows, (report,) = [x for x in lines if "loss" in x], [x for x in lines if "loss" not in x]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert report["step"] == steps
        losses = [row["loss"] for row in rows]
        assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8]), stage
    assert (tiny_run / "denoiser" / "samples" / "step-00000040.png").is_file()
    assert (tiny_run / "config.toml").is_file()
    assert {path.name for path in (tiny_run / "model").iterdir()} == {
        "clip", "latentdiff.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    }  # fmt: skip


def test_latents_are_white(tiny_run):
    """The folded VAE gives latents of mean 0 and deviation 1 in every channel."""
    config = load_config(ROOT / "configs" / "scenes-tiny.toml")
    center, std = stages.latent_statistics(load_autoencoder(tiny_run / "model"), config, torch.device("cpu"))
    torch.testing.assert_close(center, torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-3)


def test_a_finished_run_is_not_run_again(tiny_run, command):
    before = (tiny_run / "denoiser" / "log.jsonl").read_text()
    done = command("train", ROOT / "configs" / "scenes-tiny.toml", "-o", tiny_run)
    assert done.stdout.strip() == str(tiny_run / "model")
    assert (tiny_run / "denoiser" / "log.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("denoiser.prediction=epsilon", "denoiser.prediction is 'epsilon', but this run was begun with 'v_prediction'"),
        ("seed=7", "seed is 7, but this run was begun with 0"),
        ("data.mix=[1, 0, 0, 0, 1, 0]", "data.mix is (1"),
        ("clip.training.train_batch_size=8", "clip.training.train_batch_size is 8"),
    ],
)
def test_a_run_does_not_go_on_under_other_settings(tiny_run, change, named):
    """Else weights of one meaning would be saved under the name of another."""
    config = load_config(ROOT / "configs" / "scenes-tiny.toml", [change])
    with pytest.raises(ConfigError, match=re.escape(named)):
        stages.check_unchanged(config, tiny_run)


def test_what_may_change_between_starts(tiny_run, tmp_path):
    longer = ["denoiser.training.max_train_steps=99", "clip.training.lr_decay=0.5", "recommended.sampler=unipc"]
    stages.check_unchanged(load_config(ROOT / "configs" / "scenes-tiny.toml", longer), tiny_run)
    (tmp_path / "autoencoder" / "checkpoints" / "step-00000001").mkdir(parents=True)
    shutil.copy(tiny_run / "config.toml", tmp_path)
    wider = load_config(ROOT / "configs" / "scenes-tiny.toml", ["denoiser.block_out_channels=[32, 32, 32]"])
    stages.check_unchanged(wider, tmp_path)  # its stage has not begun


def test_a_stage_knows_what_it_was_trained_on(tmp_path):
    run_stage(Accelerator(cpu=True), LineStage(), SETTINGS, tmp_path, made_from="one autoencoder")
    with pytest.raises(ModelError, match="was trained on other networks"):
        run_stage(Accelerator(cpu=True), LineStage(), SETTINGS, tmp_path, made_from="another")


def test_a_report_that_fails_loses_nothing(tmp_path):
    def report(step, module):
        raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path, report=report)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000030", "step-00000040"]


def test_a_log_line_cut_off_is_dropped(tmp_path):
    run(tmp_path, max_train_steps=20)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 20, "lo\n{}\nxx}\n')
    run(tmp_path)
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, 41))


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "x"}', ""])
def test_checkpoint_state_that_says_no_step(tmp_path, state):
    run(tmp_path)
    (checkpoints(tmp_path / "checkpoints")[-1] / "state.json").write_text(state)
    with pytest.raises(ModelError, match="step-00000040 cannot be read"):
        run(tmp_path)


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_the_denoiser_needs_the_stages_before(tiny_run, tmp_path, stage):
    shutil.copytree(tiny_run / "model" / "vae", tmp_path / "model" / "vae")
    shutil.copytree(tiny_run / "clip", tmp_path / "clip")
    shutil.rmtree(tmp_path / ("model" if stage == "autoencoder" else "clip"))
    with pytest.raises(ConfigError, match=f"the denoiser needs the {stage} of the same run"):
        stages.train_denoiser(load_config(ROOT / "configs" / "scenes-tiny.toml"), tmp_path)


def test_cached_latents_that_cannot_be_read_are_named(tiny_run, tmp_path):
    config = load_config(ROOT / "configs" / "scenes-tiny.toml")
    networks = load_autoencoder(tiny_run / "model"), load_text_encoder(tiny_run / "clip")
    shutil.copytree(tiny_run / "cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="cached latents cannot be read"):
        stages.cached_latents(config, tmp_path / "cache", *networks, torch.device("cpu"))


@pytest.mark.parametrize("name", ["scenes-64", "scenes-tiny", "pixels-32"])
def test_shipped_configs_describe_networks(name):
    build.check_networks(load_config(ROOT / "configs" / f"{name}.toml"))


@pytest.mark.parametrize(
    "change",
    [
        "autoencoder.block_out_channels=[8,-16]",
        "autoencoder.block_out_channels=[]",
        "autoencoder.norm_num_groups=3",
        "autoencoder.crop=9",
        "image_size=63",
        "clip.text_heads=3",
        "clip.patch_size=100",
        "clip.vision_head_width=64",
        "denoiser.attention=[true]",
        "denoiser.norm_num_groups=7",
    ],
)
def test_networks_that_cannot_be_are_refused_before_training(change):
    with pytest.raises(ConfigError, match=change.split("=")[0].split(".")[0]):
        build.check_networks(load_config(ROOT / "configs" / "scenes-tiny.toml", [change]))


def test_pixel_space(command, tmp_path):
    """The identity autoencoder: the same code trains and draws small grey pictures, by the DDPM noise objective."""
    from PIL import Image

    changes = (
        "data.count=64",
        "clip.training.max_train_steps=2",
        "clip.training.train_batch_size=8",
        "denoiser.block_out_channels=[16, 16, 16]",
        "denoiser.preview_pictures=8",
        "denoiser.training.max_train_steps=30",
        "denoiser.training.train_batch_size=8",
        "denoiser.training.lr_warmup_steps=5",
        "recommended.num_inference_steps=4",
    )
    words = [word for change in changes for word in ("--set", change)]
    command("train", ROOT / "configs" / "pixels-32.toml", "-o", tmp_path / "run", *words)
    losses = [row["loss"] for row in logged(tmp_path / "run" / "denoiser") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert not (tmp_path / "run" / "model" / "vae").exists()
    command("generate", "a red circle", "-m", tmp_path / "run" / "model", "-s", 1, "-o", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")
