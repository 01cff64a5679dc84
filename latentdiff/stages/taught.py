"""What each method of fine-tuning trains of a model, and how what it has learnt is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.extras import networks_of
from latentdiff.formats import adapter_file
from latentdiff.networks.adapters import trained as taught_adapter
from latentdiff.networks.adapters import words as textual_inversion
from latentdiff.networks.adapters.trained import Factors
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.settings.finetuning import RANK, FineTuning
from latentdiff.stages.build import seeded
from latentdiff.training.denoiser import ConditionedNetwork, thaw

Write = Callable[[Path, Mapping[str, str]], list[Path]]


@dataclass(frozen=True)
class Taught:
    """The module that runs in a step, its trained parts by the name of their file, and how they are written.

    reads: whether the module reads the words itself, because what is trained stands before or in the text encoder.
    write: into a folder, with what is said of the training; returns the paths.
    """

    module: nn.Module
    parts: dict[str, nn.Module]
    reads: bool
    write: Write


def begin(pipe: LatentDiffusionPipeline, config: FineTuning) -> Taught:
    """Make a model ready to be taught: what is trained stands where it will be. Raises ConfigError."""
    if pipe.unet.in_channels != pipe.autoencoder.latent_channels:
        raise ConfigError("an inpainting model is not taught here: give the plain model it was made of")
    pipe.autoencoder.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    if config.method == "textual-inversion":
        return _word(pipe, config)
    return _factors(pipe, config) if config.low_rank else _weights(pipe, config)


def _weights(pipe: LatentDiffusionPipeline, config: FineTuning) -> Taught:
    """All of the U-Net's, and of the text encoder's by choice."""
    parts: dict[str, nn.Module] = {"unet": pipe.unet}

    def write(folder: Path, said: Mapping[str, str]) -> list[Path]:
        pipe.save_pretrained(folder / "model")
        return [folder / "model"]

    if not config.finetune.tune_text_encoder:
        return Taught(pipe.unet, parts, False, write)
    for encoder, name in zip(pipe.text_encoder.encoders, ("text_encoder", "text_encoder_2"), strict=False):
        thaw(encoder)
        parts[name] = encoder
    return Taught(ConditionedNetwork(pipe.unet, pipe.text_encoder), parts, True, write)


def _factors(pipe: LatentDiffusionPipeline, config: FineTuning) -> Taught:
    """LoRA's, beside the U-Net's attention, and the text encoder's by choice."""
    known, reads = networks_of(pipe), config.finetune.tune_text_encoder
    networks = known if reads else {"unet": known["unet"]}
    settings = config.lora
    rank = settings.rank or RANK
    factors = Factors(rank, settings.alpha or rank, settings.rslora, settings.dora, settings.convolutions)
    with seeded(config.seed):
        taught_adapter.begin(networks, factors)
    parts: dict[str, nn.Module] = {"adapter": taught_adapter.alone(taught_adapter.parameters_of(networks))}

    def write(folder: Path, said: Mapping[str, str]) -> list[Path]:
        adapter, paths = taught_adapter.taken(networks), [folder / adapter_file.NAMES[0]]
        adapter_file.save_peft(adapter, paths[0], said)
        if settings.kohya:
            paths.append(folder / f"{config.name}-kohya.safetensors")
            adapter_file.save_kohya(adapter, paths[1], known, said)
        return paths

    module = ConditionedNetwork(pipe.unet, pipe.text_encoder) if reads else pipe.unet
    return Taught(module, parts, reads, write)


def _word(pipe: LatentDiffusionPipeline, config: FineTuning) -> Taught:
    """The vectors of one new word."""
    pipe.unet.requires_grad_(False)
    word = config.word
    vectors = textual_inversion.begin_word(pipe.text_encoder, word.token, word.initial, word.vectors)
    parts: dict[str, nn.Module] = {"word": taught_adapter.alone(vectors)}

    def write(folder: Path, said: Mapping[str, str]) -> list[Path]:
        return [textual_inversion.save_word(vectors, folder, word.token)]

    return Taught(ConditionedNetwork(pipe.unet, pipe.text_encoder), parts, True, write)
