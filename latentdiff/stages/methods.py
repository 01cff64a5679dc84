"""The methods of fine-tuning: which parameters each trains, and how it writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.core.files import atomic
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.drawing.presets import settled_for
from latentdiff.families.controls import PART as CONTROLNET
from latentdiff.families.image_prompts import PART as IP_ADAPTER
from latentdiff.families.image_prompts import image_encoder_for, save_ip_adapter
from latentdiff.families.loading import save_model
from latentdiff.families.own import seeded
from latentdiff.formats import adapter_file, words_file
from latentdiff.model import Model
from latentdiff.networks.adapters import trained
from latentdiff.networks.adapters.trained import Factors
from latentdiff.networks.adapters.words import begin_word
from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.backbones.unet import TIME_CONDITIONS, UNet
from latentdiff.networks.controls.controlnet import ControlNet, SteeredNetwork
from latentdiff.networks.controls.ip_adapter import IPAdapter, PromptedNetwork
from latentdiff.runtime.quantized import is_quantized
from latentdiff.settings.finetuning import RANK, FineTuning
from latentdiff.stages.encoding import AnyCodec, AnyEncoder, AnyTextEncoder
from latentdiff.training.denoiser import ConditionedNetwork, thaw

EXTRA_INPUTS = {"mean-flow": "until"}  # what the students of an objective read beside the time
Write = Callable[[Path, Mapping[str, str]], list[Path]]


@dataclass(frozen=True)
class Tuning:
    """The module of a training step, its trained parts by file name, and a function that writes them.

    trains_text_encoder: whether the text encoder or its embeddings are trained: then the module reads captions itself.
    write: (folder, metadata) -> the paths that were written. control, ip_adapter: what previews draw with. teacher: the
    backbone as it was, which a student learns from.
    """

    module: nn.Module
    parts: dict[str, nn.Module]
    trains_text_encoder: bool
    write: Write
    control: ControlNet | None = None
    ip_adapter: IPAdapter | None = None
    teacher: Any = None


def begin(model: Model, config: FineTuning, words: frozenset[str] = frozenset()) -> Tuning:
    """Prepare a model for a method: add the parameters to train, freeze the others. words: of the training captions.

    Raises ConfigError.
    """
    check_kind(model)
    if is_quantized(model) and (config.finetune.tune_text_encoder or not config.allows_quantized):
        raise ConfigError("quantized weights are frozen: use a rank without dora, or textual-inversion")
    _, text_encoder, codec = trainable(model)
    codec.requires_grad_(False)
    text_encoder.requires_grad_(False)
    if config.method == "textual-inversion":
        return _word(model, config)
    if config.method == "controlnet":
        return _control(model, config)
    if config.method == "ip-adapter":
        return _image_prompt(model, config)
    teacher = copy.deepcopy(model.backbone) if config.method == "consistency" else None
    if teacher is not None and not config.low_rank:
        model = _student(model, config)
    tuning = _factors(model, config) if config.low_rank else _weights(model, config, words)
    return replace(tuning, teacher=teacher)


def _student(model: Model, config: FineTuning) -> Model:
    """The model with few-step settings, and with a layer for what the student reads beyond its teacher."""
    scales, more = config.consistency.guidance_range, EXTRA_INPUTS.get(config.consistency.objective)
    few = settled_for(model, student_settings(model, config))
    if more == "until" and model.prediction != "flow":
        raise ConfigError("a mean flow requires a model of a straight path that predicts its velocity (flow)")
    if more or scales is not None:
        if not isinstance(model.backbone, UNet) or set(TIME_CONDITIONS) & model.backbone.spec.reads.keys():
            raise ConfigError("this student requires a U-Net that does not read a guidance or an end yet")
        model.backbone.add_time_condition(more or "guidance")
    return replace(model, card=replace(model.card, defaults=few))


def student_settings(model: Model, config: FineTuning) -> dict[str, Any]:
    """The settings that a student is drawn with: its preset, and a guidance scale that it was trained with."""
    settings: dict[str, Any] = {"preset": "mean-flow" if config.consistency.objective == "mean-flow" else "lcm"}
    if (scales := config.consistency.guidance_range) is not None:
        settings["guidance_scale"] = min(max(model.card.defaults.get("guidance_scale", 7.5), scales[0]), scales[1])
    return settings


def check_kind(model: Model) -> None:
    """Raises ConfigError for a model that reads pictures."""
    if model.inpaints:
        raise ConfigError("fine-tuning an inpainting model is not supported: give the plain model that it comes from")
    if model.edits:
        raise ConfigError("fine-tuning an editing model is not supported: captioned pictures have no picture before")
    if model.enlarging is not None:
        raise ConfigError("fine-tuning a model that enlarges pictures is not supported")


def trainable(model: Model) -> tuple[UNet | Transformer, AnyEncoder, AnyCodec]:
    """The networks of a torch model, if fine-tuning supports them. Raises ConfigError otherwise."""
    backbone, encoder, codec = model.backbone, model.encoder, model.codec
    known = isinstance(backbone, UNet | Transformer) and isinstance(encoder, AnyEncoder)
    if not (known and isinstance(codec, AnyCodec)):
        raise ConfigError(f"fine-tuning does not know the networks of {model.card.name}")
    return backbone, encoder, codec  # type: ignore[return-value]


def _clip_of(encoder: AnyEncoder, what: str) -> AnyTextEncoder:
    """Raises ConfigError for encoders that cannot be trained here."""
    if not isinstance(encoder, AnyTextEncoder):
        raise ConfigError(f"{what} requires CLIP as the only text encoder")
    return encoder


def _weights(model: Model, config: FineTuning, words: frozenset[str]) -> Tuning:
    """All weights of the U-Net, and optionally of the text encoder."""
    unet, text_encoder, _ = trainable(model)
    parts: dict[str, nn.Module] = {"unet": unet}

    def write(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        known = model.card.words
        card = replace(model.card, name=folder.resolve().name, words=None if known is None else known | words)
        of_one = {word: thing for word, thing in card.of_one_thing.items() if word not in words}
        card = replace(card, of_one_thing=of_one)
        save_model(replace(model, card=card), folder / "model")
        return [folder / "model"]

    if not config.finetune.tune_text_encoder:
        return Tuning(unet, parts, False, write)
    encoders = _clip_of(text_encoder, "training the text encoder").encoders
    for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=False):
        thaw(encoder, words=False)
        parts[name] = encoder
    return Tuning(ConditionedNetwork(unet, text_encoder), parts, True, write)


def _factors(model: Model, config: FineTuning) -> Tuning:
    """LoRA's factors beside the attention of the U-Net, and optionally of the text encoder."""
    unet, text_encoder, _ = trainable(model)
    known, reads = adaptable_networks(model), config.finetune.tune_text_encoder
    if reads:
        _clip_of(text_encoder, "training the text encoder")
    networks: dict[str, nn.Module] = (
        known if reads else {name: known[name] for name in ("unet", "transformer") if name in known}
    )
    settings = config.lora
    rank = settings.rank or RANK
    factors = Factors(rank, settings.alpha or rank, settings.rslora, settings.dora, settings.convolutions)
    with seeded(config.seed):
        trained.attach_factors(networks, factors)
    parts: dict[str, nn.Module] = {"adapter": trained.parameter_module(trained.parameters_of(networks))}

    def write(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        adapter, paths = trained.as_adapter(networks), [folder / adapter_file.NAMES[0]]
        adapter_file.save_peft(adapter, paths[0], metadata)
        if settings.kohya or (settings.convolutions and not settings.rslora):
            paths.append(folder / f"{config.name}-kohya.safetensors")
            adapter_file.save_kohya(adapter, paths[1], known, metadata)
        return paths

    module = ConditionedNetwork(unet, text_encoder) if reads else unet
    return Tuning(module, parts, reads, write)


def _word(model: Model, config: FineTuning) -> Tuning:
    """The vectors of a new word."""
    unet, text_encoder, _ = trainable(model)
    unet.requires_grad_(False)
    word = config.word
    vectors = begin_word(_clip_of(text_encoder, "a learnt word"), word.token, word.initial, word.vectors)
    parts: dict[str, nn.Module] = {"word": trained.parameter_module(vectors)}

    def write(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        return [words_file.save_word(vectors, folder, word.token)]

    return Tuning(ConditionedNetwork(unet, text_encoder), parts, True, write)


def _control(model: Model, config: FineTuning) -> Tuning:
    """A ControlNet beside the frozen U-Net."""
    unet, _, codec = trainable(model)
    if not isinstance(unet, UNet):
        raise ConfigError("a ControlNet requires a U-Net, which this model does not have")
    unet.requires_grad_(False)
    with seeded(config.seed):
        control = ControlNet.create(unet.model, codec.factor)

    def write(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        with atomic(folder / CONTROLNET) as made:
            control.save(made)
        return [folder / CONTROLNET]

    return Tuning(SteeredNetwork(unet, control), {CONTROLNET: control}, False, write, control)


def _image_prompt(model: Model, config: FineTuning) -> Tuning:
    """An IP-Adapter beside the frozen U-Net; its image encoder is frozen too."""
    unet, *_ = trainable(model)
    if not isinstance(unet, UNet):
        raise ConfigError("an IP-Adapter requires a U-Net, which this model does not have")
    unet.requires_grad_(False)
    place = Path(config.image_prompt.encoder) if config.image_prompt.encoder else None
    encoder = image_encoder_for(model, place).requires_grad_(False)
    with seeded(config.seed):
        learning = IPAdapter.create(unet, encoder)
    adapter = IPAdapter(learning.projection, learning.keys, learning.values, learning.names, encoder)
    learning.encoder = None  # checkpoints hold what is trained

    def write(folder: Path, metadata: Mapping[str, str]) -> list[Path]:
        with atomic(folder / IP_ADAPTER) as made:
            save_ip_adapter(adapter, made)
        return [folder / IP_ADAPTER]

    module = PromptedNetwork(unet, learning)
    return Tuning(module, {IP_ADAPTER: learning}, False, write, ip_adapter=adapter)
