"""Configs: every one that ships is valid, and what is wrong is named."""

from types import SimpleNamespace

import pytest
import torch

from latentdiff.core.errors import ConfigError
from latentdiff.families.own import new_path, times_of
from latentdiff.settings.config import Config, load_config, save_config
from latentdiff.settings.finetuning import load_finetuning
from latentdiff.stages.denoiser import _training

from .conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_save(path, tmp_path):
    load = load_finetuning if path.stem.startswith("finetune-") else load_config
    config = load(path)
    assert config.name == path.stem
    save_config(config, tmp_path / "config.toml")
    assert load(tmp_path / "config.toml") == config


def test_the_objective_defaults_to_ddpm_s():
    assert (Config().denoiser.prediction, Config().denoiser.weighting) == ("epsilon", "uniform")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[denoiser.training]\nlerning_rate = 1e-3",
            'unknown key "denoiser.training.lerning_rate" (did you mean learning_rate?)',
        ),
        ("[denoiser]\nprediction = 'noise'", 'key "denoiser.prediction": must be'),
        ("[clip.training]\ntrain_batch_size = 0", 'key "clip.training.train_batch_size"'),
        ("[clip.training]\ntrain_batch_size = '8'", 'key "clip.training.train_batch_size"'),
        ("[clip.training]\ntrain_batch_size = true", 'key "clip.training.train_batch_size"'),
        ("[clip.training]\nlearning_rate = nan", 'key "clip.training.learning_rate"'),
        ("name = 'a'\nname = 'b'", "not valid TOML"),
        ("name = ../..", "not valid TOML"),
        ("name = '../up'", 'key "name"'),
        ("<html>", "not valid TOML"),
        ("[data]\nmix = [0, 0, 0, 0, 0, 0]", 'key "data": data.mix has no share above 0'),
        ("[data]\nmix = [1, 1]", 'key "data.mix.2": is missing'),
        ("[data]\nmix = [1, 1, 1, 1, 1, -1]", 'key "data.mix.5": must be at least 0'),
    ],
)
def test_faults_are_named(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith("config.toml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("seed = 1")
    config = load_config(path, ["seed=7", "name=mine", "clip.training.learning_rate=1e-4"])
    assert (config.seed, config.name, config.clip.training.learning_rate) == (7, "mine", 1e-4)
    with pytest.raises(ConfigError, match="is not key=value"):
        load_config(path, ["seed"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["denoiser.snr_gamma=3"], "snr_gamma requires a weighting that is not uniform"),
        (["denoiser.logit_mean=2"], "logit_mean and logit_std require times = logit_normal"),
        (["denoiser.logit_std=0.5"], "logit_mean and logit_std require times = logit_normal"),
        (
            ['denoiser.path="straight"', 'denoiser.prediction="flow"', "denoiser.schedule.zero_terminal_snr=true"],
            "zero_terminal_snr has no effect on a straight path",
        ),
    ],
)
def test_settings_without_effect(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, changes)


def test_settings_with_their_effect():
    config = load_config(None, ["denoiser.logit_mean=2", "denoiser.logit_std=0.5", 'denoiser.times="logit_normal"'])
    times = times_of(config.denoiser, new_path(config))
    assert (times.distribution, times.mean, times.std) == ("logit_normal", 2.0, 0.5)
    straight = ['denoiser.path="straight"', 'denoiser.prediction="flow"', "denoiser.schedule.num_train_timesteps=500"]
    assert new_path(load_config(None, straight)).T == 500
    weighted = ["denoiser.snr_gamma=3", 'denoiser.weighting="p2"', 'denoiser.prediction="epsilon"']
    config = load_config(None, weighted)
    loss, _, _ = _training(config, SimpleNamespace(pictures=SimpleNamespace(buckets=lambda: {(): [0]})), 1)
    t, noise = torch.tensor([100]), torch.ones(1, 1, 1, 1)
    value = loss(lambda x, t, conditions: 0 * x, noise, noise, t, None)
    assert float(value) == pytest.approx((1 + new_path(config).numbered(100).snr) ** -3, rel=1e-4)
