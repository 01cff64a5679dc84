"""What a pipeline draws with beside its model: adapters, learnt words, a weaker model, CLIP, another VAE.

Each leaves the source that pictures name, so that they can be drawn again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.drawing.record import Source, recorded

if TYPE_CHECKING:
    from latentdiff.formats.adapter_file import Networks
    from latentdiff.networks.scorer import Scorer
    from latentdiff.pipeline import LatentDiffusionPipeline

LARGEST_WEIGHT = 10.0


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a model: layers it changes, names nothing answers to, factors without their other half."""

    name: str
    matched: int
    unused: list[str]
    missing: list[str]

    def __str__(self) -> str:
        counts = f"{self.matched} layers matched, {len(self.unused)} names unused, {len(self.missing)} missing"
        told = f"{self.name}: {counts}"
        named = [*self.unused, *self.missing]
        return f"{told} ({', '.join(named[:3])}{', ...' if len(named) > 3 else ''})" if named else told


@dataclass
class Extras:
    """Loaded by name; `sources` are in the order in which they were."""

    sources: dict[str, Source] = field(default_factory=dict)
    weaker: LatentDiffusionPipeline | None = None
    scorer: Scorer | None = None


def networks_of(pipe: LatentDiffusionPipeline) -> Networks:
    """The networks that adapters change, by diffusers' names."""
    from latentdiff.networks.encoders.two_clips import DualTextEncoder

    texts = pipe.text_encoder
    if isinstance(texts, DualTextEncoder):
        return {"unet": pipe.unet.model, "text_encoder": texts.first.model, "text_encoder_2": texts.second.model}
    return {"unet": pipe.unet.model, "text_encoder": texts.model}


def load_adapter(
    pipe: LatentDiffusionPipeline, path: Path, *, name: str | None = None, weight: float = 1.0, merged: bool = False
) -> Fit:
    """Put an adapter beside the networks, or add it to their weights. Raises ModelError, ConfigError."""
    from latentdiff.core.files import sha256_of
    from latentdiff.formats import adapter_file
    from latentdiff.networks.adapters import attached as adapters

    pipe.change("an adapter")
    _check_weight(weight)
    file = adapter_file.adapter_path(path)
    called = re.sub(r"\W", "_", str(name or (path.name if path.is_dir() else path.stem)))
    if f"adapter {called}" in pipe.extras.sources:
        raise ConfigError(f"an adapter {called!r} is loaded already. Give this one another name ({path})")
    networks = networks_of(pipe)
    adapter = adapter_file.read_adapter(path, networks)
    if merged:
        adapters.merge(adapter, networks, weight)
    else:
        adapters.attach(adapter, networks, called, weight)
    kind = "merged" if merged else "lora"
    pipe.extras.sources[f"adapter {called}"] = Source(kind, recorded(path), sha256_of(file), weight)
    return Fit(called, adapter.matched, adapter.unused, adapter.missing)


def weigh_adapters(pipe: LatentDiffusionPipeline, weights: Mapping[str, float]) -> None:
    """Make these adapters the active ones, with these weights. Raises ModelError."""
    from latentdiff.networks.adapters import attached as adapters

    pipe.change("an adapter")
    for weight in weights.values():
        _check_weight(weight)
    adapters.weigh(networks_of(pipe), weights)
    for name, source in pipe.extras.sources.items():
        if source.kind == "lora":
            pipe.extras.sources[name] = replace(source, weight=weights.get(name.removeprefix("adapter "), 0.0))


def merge_adapters(pipe: LatentDiffusionPipeline, scale: float = 1.0) -> None:
    """Add the active adapters to the weights, each by its weight times `scale`."""
    from latentdiff.networks.adapters import attached as adapters

    networks = networks_of(pipe)
    weights = {name: scale * weight for name, weight in adapters.weights_of(networks).items()}
    weigh_adapters(pipe, weights)
    adapters.merge_attached(networks)
    for name, source in pipe.extras.sources.items():
        if source.kind == "lora":
            pipe.extras.sources[name] = replace(source, kind="merged")


def unload_adapters(pipe: LatentDiffusionPipeline) -> None:
    """Take off every adapter that is not merged."""
    from latentdiff.networks.adapters import attached as adapters

    pipe.change("an adapter")
    adapters.detach(networks_of(pipe))
    pipe.extras.sources = {name: source for name, source in pipe.extras.sources.items() if source.kind != "lora"}


def load_words(pipe: LatentDiffusionPipeline, path: Path, word: str | None = None) -> list[str]:
    """Teach the text encoder the words of a textual-inversion file. Raises ModelError."""
    from latentdiff.core.files import sha256_of
    from latentdiff.networks.adapters import words as textual_inversion

    pipe.change("a learnt word")
    words = textual_inversion.load_words(path, pipe.text_encoder, word)
    file = path / textual_inversion.FILE if path.is_dir() else path
    source = Source("embedding", recorded(path), sha256_of(file), word=word)
    pipe.extras.sources[f"embedding {', '.join(words)}"] = source
    return words


def load_clip(pipe: LatentDiffusionPipeline, directory: Path | None = None) -> None:
    """CLIP for guidance and scores: a folder in open_clip's format, or the model's own, which has no token embeddings.

    Raises ConfigError, ModelError.
    """
    from latentdiff.core.files import sha256_of
    from latentdiff.networks.encoders.clip import TextEncoder
    from latentdiff.networks.scorer import WEIGHTS, load_own_scorer, load_scorer

    pipe.in_torch("guidance by CLIP")
    if directory is not None:
        scorer, source = load_scorer(directory), Source("clip", recorded(directory), sha256_of(directory / WEIGHTS))
    else:
        folder = pipe.card.folder
        if folder is None or not (folder / "clip").is_dir() or not isinstance(pipe.text_encoder, TextEncoder):
            raise ConfigError("this model has no CLIP of its own. Name one in open_clip's format (load_clip, --clip)")
        scorer = load_own_scorer(folder)  # words that the text encoder has learnt since are none of CLIP's
        source = Source("clip", "", sha256_of(folder / "clip" / WEIGHTS))
    pipe.extras.scorer, pipe.extras.sources["clip"] = scorer.to(pipe.device), source


def load_weaker(pipe: LatentDiffusionPipeline, path: str | Path) -> None:
    """A weaker model for autoguidance: smaller, or trained for less time. Raises ModelError where latents differ."""
    from latentdiff.families.pretrained import load_pipeline

    pipe.in_torch("a weaker model")
    weaker = load_pipeline(path, device=str(pipe.device), dtype=pipe.unet.dtype)
    same = weaker.path == pipe.path
    if not same or weaker.autoencoder.latent_channels != pipe.autoencoder.latent_channels:
        raise ModelError(f"the weaker model must have the same latents and noise schedule ({path})")
    pipe.extras.weaker = weaker
    pipe.extras.sources["weaker"] = Source("weaker", weaker.card.source or "", weaker.card.hash)


def load_vae(pipe: LatentDiffusionPipeline, path: Path, *, as_stored: bool = False) -> None:
    """Another VAE for the same latents: its folder, or the model folder that has it. Raises ModelError, UnsafeError.

    It takes the precision of the one before, unless it is to stay as it is stored.
    """
    from latentdiff.formats.folder import check_vae, network_hash
    from latentdiff.formats.weights import load_vae
    from latentdiff.networks.codecs.kl import misfit

    pipe.change("another VAE")
    folder, own = check_vae(path), pipe.autoencoder
    vae = load_vae(folder)
    if why := misfit(own, vae):
        raise ModelError(f"this VAE does not fit the model: {why} ({path})")
    pipe.autoencoder = vae.to(pipe.device, None if as_stored else own.dtype)
    pipe.extras.sources["vae"] = Source("vae", recorded(path), network_hash(folder))


def path_of(value: object) -> Path:
    """A path, as text or as one. Raises ConfigError for anything else."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ConfigError(f"a path is needed (got {str(value)[:40]!r})")
    return Path(value)


def _check_weight(weight: object) -> None:
    if not isinstance(weight, int | float) or not abs(weight) <= LARGEST_WEIGHT:
        raise ConfigError(f"an adapter's weight must be from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g} (got {weight})")


def names_and_weights(names: str | Sequence[str], weights: float | Sequence[float] | None) -> dict[str, float]:
    """One name or several, with a weight for all or one each, as diffusers takes them. Raises ConfigError."""
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else [names]
    if not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"adapters are called by names (got {str(names)[:40]!r})")
    one = 1.0 if weights is None else weights
    each: list[Any] = list(one) if isinstance(one, list | tuple) else [one] * len(listed)
    for weight in each:
        _check_weight(weight)
    if len(each) != len(listed):
        raise ConfigError(f"{len(each)} weights for {len(listed)} adapters")
    return {name: float(weight) for name, weight in zip(listed, each, strict=True)}
