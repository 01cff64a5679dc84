"""Things loaded beside a model: adapters, learnt words, a weaker model, CLIP, another VAE.

Each function returns another painter, which also names the source, so that pictures can be reproduced. Adapters and
words change the model's modules in place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.core.files import recorded, sha256_of
from latentdiff.core.turn import LOADING
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.record import Source
from latentdiff.formats.folder import FEW_STEPS, FEW_STEPS_FILE
from latentdiff.model import Model, ModelCard
from latentdiff.networks.protocols import PromptedByPictures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from latentdiff.networks.adapters.words import Words
    from latentdiff.networks.controls.controlnet import ControlNet
    from latentdiff.networks.scorer import Scorer
    from latentdiff.networks.upscaler import Upscaler

LARGEST_WEIGHT = 10.0


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a model: layers that it changes, names that match none, factors without a partner.

    words: learnt words in the same file, which prompts may use now. layers: those that it changes, (part, module).
    """

    name: str
    matched: int
    unused: list[str]
    missing: list[str]
    words: list[str] = field(default_factory=list)
    layers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        counts = f"{self.matched} layers matched, {len(self.unused)} names unused, {len(self.missing)} missing"
        named = [*self.unused, *self.missing]
        examples = f" ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})" if named else ""
        words = f"; words: {', '.join(self.words)}" if self.words else ""
        return f"{self.name}: {counts}{examples}{words}"


def adaptable_networks(model: Model) -> dict[str, nn.Module]:
    """The networks that adapters change, by diffusers' names."""
    from torch import nn

    return {name: part for name, part in model.parts.items() if isinstance(part, nn.Module) and name != "vae"}


def with_adapter(
    painter: Painter,
    path: Path,
    *,
    name: str | None = None,
    weight: float = 1.0,
    merged: bool = False,
    may_have_words: bool = True,
) -> tuple[Painter, Fit]:
    """Attach an adapter beside the networks, or merge it into their weights. Raises ModelError, ConfigError.

    may_have_words: no for a student of few steps, whose words would have no record.
    """
    from latentdiff.formats import adapter_file
    from latentdiff.networks.adapters import attached

    _check_weight(weight)
    file = adapter_file.adapter_path(path)
    called = re.sub(r"\W", "_", str(name or (path.name if path.is_dir() else path.stem)))
    if f"adapter {called}" in painter.sources:
        raise ConfigError(f"the adapter name {called!r} is in use. Give this one another name ({path})")
    networks = adaptable_networks(painter.model)
    with LOADING:
        adapter = adapter_file.read_adapter(path, networks)
    if adapter.words and not may_have_words:
        raise ModelError(f"a student of few steps cannot have learnt words ({', '.join(adapter.words)} in {file})")
    bundled = [_words(painter, state, file, _free(painter, word)) for word, state in adapter.words.items()]
    with LOADING:
        if merged:
            attached.merge(adapter, networks, weight)
        else:
            attached.attach(adapter, networks, called, weight)
    for words in bundled:
        words.add()
    source = Source("merged" if merged else "lora", recorded(path), sha256_of(file), weight)
    names = [name for words in bundled for name in words.names]
    layers = tuple((part, module) for part, own in adapter.layers.items() for module in own)
    fit = Fit(called, adapter.matched, adapter.unused, adapter.missing, names, layers)
    return painter.with_source(f"adapter {called}", source), fit


def few_steps_at(folder: Path | None) -> Path | None:
    """The file of the student of few steps in a model's folder; None if it has none."""
    file = None if folder is None else folder / FEW_STEPS / FEW_STEPS_FILE
    return file if file is not None and file.is_file() else None


def few_steps_of(card: ModelCard) -> Path:
    """See `few_steps_at`. Raises ConfigError if the folder has none."""
    if (file := few_steps_at(card.folder)) is None:
        raise ConfigError(f"{card.name} has no student of few steps in its folder ({FEW_STEPS})")
    return file


def source_of_few_steps(file: Path) -> Source:
    """The record of a model's own student of few steps."""
    return Source("few-steps", "", sha256_of(file))


def with_few_steps(painter: Painter, file: Path) -> tuple[Painter, Fit]:
    """Merge a model's student of few steps into the weights. Raises ModelError."""
    student, fit = with_adapter(painter, file, name=FEW_STEPS, merged=True, may_have_words=False)
    return replace(student, sources=painter.sources).with_source("few-steps", source_of_few_steps(file)), fit


def weighed(painter: Painter, weights: Mapping[str, float]) -> Painter:
    """Make these adapters active, with these weights. Raises ModelError."""
    from latentdiff.networks.adapters import attached

    for weight in weights.values():
        _check_weight(weight)
    attached.weigh(adaptable_networks(painter.model), weights)
    return _with_live(painter, lambda name, source: replace(source, weight=weights.get(name, 0.0)))


def merged(painter: Painter, scale: float = 1.0) -> Painter:
    """Add the active adapters to the networks, each times its weight and `scale`. Raises ModelError."""
    from latentdiff.networks.adapters import attached

    networks = adaptable_networks(painter.model)
    attached.check_numbers(networks)  # before any weight changes
    weights = {name: scale * weight for name, weight in attached.weights_of(networks).items()}
    painter = weighed(painter, weights)
    attached.merge_attached(networks)
    return _with_live(painter, lambda name, source: replace(source, kind="merged"))


def unloaded(painter: Painter) -> Painter:
    """Detach every adapter that is not merged."""
    from latentdiff.networks.adapters import attached

    attached.detach(adaptable_networks(painter.model))
    return replace(painter, sources=_sources_but(painter, "lora"))


def _with_live(painter: Painter, change: Any) -> Painter:
    """A painter with changed sources of its attached adapters."""
    sources = {
        name: change(name.removeprefix("adapter "), source) if source.kind == "lora" else source
        for name, source in painter.sources.items()
    }
    return replace(painter, sources=sources)


def check_merged(painter: Painter) -> None:
    """Raises ConfigError for adapters beside the weights: a saved folder holds weights only."""
    live = [name.removeprefix("adapter ") for name, source in painter.sources.items() if source.kind == "lora"]
    if live:
        raise ConfigError(f"adapters are beside the weights ({', '.join(live)}): fuse_lora or unload_lora_weights")


def with_words(painter: Painter, path: Path, word: str | None = None) -> tuple[Painter, list[str]]:
    """Add the words of a textual-inversion file to the text encoder. Raises ModelError."""
    from latentdiff.formats.words_file import read_words

    file, state = read_words(path)
    words = _words(painter, state, file, word)
    words.add()
    source = Source("embedding", recorded(path), sha256_of(file), word=word)
    return painter.with_source(f"embedding {', '.join(words.names)}", source), words.names


def _free(painter: Painter, word: str) -> str:
    """The word of a bundle, in brackets if the text encoder has a token of that name."""
    encoder: Any = painter.model.encoder
    taken = hasattr(encoder, "encoders") and word.lower() in encoder.encoders[0].tokenizer.get_vocab()
    return f"<{word}>" if taken else word


def _words(painter: Painter, state: dict[str, Tensor], file: Path, word: str | None = None) -> Words:
    from latentdiff.networks.adapters.words import words_of

    encoder: Any = painter.model.encoder
    if not hasattr(encoder, "encoders"):
        raise ModelError(f"learnt words require a CLIP text encoder, which this model does not have ({file})")
    return words_of(state, file, encoder, word)


def with_scorer(painter: Painter, scorer: Scorer, source: Source) -> Painter:
    """Load a CLIP for guidance and scores."""
    return replace(painter, scorer=scorer.to(painter.model.place.device)).with_source("clip", source)


def with_weaker(painter: Painter, weaker: Model) -> Painter:
    """Load a weaker model for autoguidance. Raises ModelError if its latents or its path differ."""
    _check_latents(painter, weaker, "weaker model")
    if (weaker.inpaints and not painter.model.inpaints) or (weaker.edits and not painter.model.edits):
        raise ModelError(f"the weaker model must not read a picture that the model does not read ({weaker.card.name})")
    source = Source("weaker", weaker.card.source or "", weaker.card.hash)
    return replace(painter, weaker=weaker).with_source("weaker", source)


def with_refiner(painter: Painter, refiner: Model) -> Painter:
    """Load a model that draws the last levels. Raises ModelError if its latents or its path differ."""
    _check_latents(painter, refiner, "refiner")
    if refiner.inpaints or refiner.edits:
        raise ModelError(f"a refiner must read no picture beside the latents ({refiner.card.name})")
    source = Source("refiner", refiner.card.source or "", refiner.card.hash)
    return replace(painter, refiner=refiner).with_source("refiner", source)


def with_cascade(painter: Painter, model: Model) -> Painter:
    """Load one more model that enlarges. Raises ConfigError for one that does not."""
    if model.enlarging is None:
        raise ConfigError(f"a cascade requires models that enlarge pictures; {model.card.name} draws them")
    painter = replace(painter, cascade=(*painter.cascade, Painter(model)))
    return painter.with_source(
        f"cascade {len(painter.cascade)}", Source("cascade", model.card.source or "", model.card.hash)
    )


def with_upscaler(painter: Painter, upscaler: Upscaler, file: Path) -> Painter:
    """Load a network that enlarges finished pictures, or with hires_scale the input of the second pass."""
    return replace(painter, upscaler=upscaler).with_source(
        "upscaler", Source("upscaler", recorded(file), sha256_of(file))
    )


def source_of_control(path: Path) -> Source:
    """The record of a ControlNet from the user's path."""
    from latentdiff.formats.folder import network_hash

    return Source("controlnet", recorded(path), sha256_of(path) if path.is_file() else network_hash(path))


def with_control(painter: Painter, control: ControlNet, source: Source) -> Painter:
    """Load one more ControlNet; every picture then requires a hint for it."""
    if painter.model.runtime == "torch":
        control = control.to(painter.model.place.device, painter.model.backbone.dtype)
    painter = replace(painter, controls=(*painter.controls, control))
    return painter.with_source(f"controlnet {len(painter.controls)}", source)


def without_controls(painter: Painter) -> Painter:
    """Remove all ControlNets."""
    return replace(painter, controls=(), sources=_sources_but(painter, "controlnet"))


def _sources_but(painter: Painter, kind: str) -> dict[str, Source]:
    return {name: source for name, source in painter.sources.items() if source.kind != kind}


def source_of_ip_adapter(file: Path, encoder: Path | None) -> Source:
    """The record of an IP-Adapter from the user's paths."""
    from latentdiff.formats.folder import weight_files

    files = [] if encoder is None else weight_files(encoder)
    named = None if encoder is None else recorded(encoder)
    return Source("ip-adapter", recorded(file), sha256_of(file, *files), encoder=named)


def reads_image_prompts(model: Model) -> bool:
    """Whether an IP-Adapter can be put beside the backbone."""
    return isinstance(model.backbone, PromptedByPictures) and bool(model.backbone.prompted_layers)


def with_ip_adapter(painter: Painter, adapter: Any, source: Source) -> Painter:
    """Load one more IP-Adapter; every picture then requires an image prompt for it."""
    painter = with_adapters_placed(replace(painter, ip_adapters=(*painter.ip_adapters, adapter)))
    return painter.with_source(f"ip-adapter {len(painter.ip_adapters)}", source)


def with_adapters_placed(painter: Painter) -> Painter:
    """The same painter with its IP-Adapters on the model's device in its precision; a compiled model's are float32."""
    place, backbone = painter.model.place, painter.model.backbone
    precision = backbone.dtype if place.runtime == "torch" else "float32"
    placed = tuple(adapter.placed(place.device, precision) for adapter in painter.ip_adapters)
    return replace(painter, ip_adapters=placed)


def without_ip_adapters(painter: Painter) -> Painter:
    """Remove all IP-Adapters."""
    return replace(painter, ip_adapters=(), sources=_sources_but(painter, "ip-adapter"))


def _check_latents(painter: Painter, other: Model, what: str) -> None:
    """Raises ModelError for another model whose latents or path differ."""
    if (other.path, other.codec.latent_channels) != (painter.model.path, painter.model.codec.latent_channels):
        raise ModelError(f"the {what} must have the same latents and noise schedule ({other.card.name})")


def source_of_vae(path: Path, folder: Path | None = None) -> Source:
    """The record of a VAE from the user's path: a file, or what lies in `folder`."""
    from latentdiff.formats.folder import network_hash

    return Source("vae", recorded(path), sha256_of(path) if folder is None else network_hash(folder))


def with_codec(painter: Painter, codec: Any, source: Source) -> Painter:
    """Replace the model's VAE. Raises ModelError if its latents differ."""
    from latentdiff.networks.codecs.autoencoder import misfit

    if why := misfit(painter.model.codec, codec):
        raise ModelError(f"this VAE does not fit the model: {why} ({source.path or 'a module'})")
    parts = {**painter.model.parts, "vae": codec.vae}
    return replace(painter, model=replace(painter.model, codec=codec, parts=parts)).with_source("vae", source)


def _check_weight(weight: object) -> None:
    if not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
        raise ConfigError(f"an adapter's weight must be from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g} (got {weight})")


def names_and_weights(names: str | Sequence[str], weights: float | Sequence[float] | None) -> dict[str, float]:
    """One or several names, with one weight for all or one each, like diffusers. Raises ConfigError."""
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else [names]
    if not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"adapter names must be text (got {str(names)[:40]!r})")
    one = 1.0 if weights is None else weights
    each: list[Any] = list(one) if isinstance(one, list | tuple) else [one] * len(listed)
    for weight in each:
        _check_weight(weight)
    if len(each) != len(listed):
        raise ConfigError(f"{len(each)} weights for {len(listed)} adapters")
    return {name: float(weight) for name, weight in zip(listed, each, strict=True)}
