"""Models trained here from nothing, built from a config.

They have Stable Diffusion's layout. In addition they may have no VAE, which makes them pixel-space models, and they may
contain the CLIP of their text encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError, raised_as
from latentdiff.diffusion.path import Path, Straight, schedule_named
from latentdiff.diffusion.times import Times
from latentdiff.families import dit, stable_diffusion, upscaler
from latentdiff.model import Enlarging, Family, Model, ModelCard

if TYPE_CHECKING:
    import torch
    from torch import nn

    from latentdiff.networks.backbones.dit import DiT
    from latentdiff.networks.backbones.unet import UNet
    from latentdiff.networks.clip import Clip
    from latentdiff.networks.codecs.autoencoder import Autoencoder
    from latentdiff.networks.codecs.identity import IdentityCodec
    from latentdiff.networks.encoders.class_labels import ClassLabels
    from latentdiff.networks.encoders.clip import TextEncoder, Tokenizer
    from latentdiff.settings.config import Config, Learning

    AnyCodec = Autoencoder | IdentityCodec

_CAPTIONS = 200_000  # from which merges are learnt


def is_own(directory: FilePath) -> bool:
    """Whether a folder has what only models trained here have: a CLIP, or no VAE."""
    return (directory / "clip").is_dir() or not (directory / "vae").is_dir()


def load(directory: FilePath, variant: str | None) -> Model:
    """See Family."""
    return replace(stable_diffusion.load(directory, variant), family=FAMILY)


FAMILY = Family(
    "latentdiff",
    stable_diffusion.FAMILY.pipelines,
    stable_diffusion.PARTS,
    frozenset({"vae"}),
    load,
    stable_diffusion.save,
    stable_diffusion.index,
    stable_diffusion.defaults,
    architecture=stable_diffusion.architecture,
    context=stable_diffusion.unscaled,
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which the initial weights of modules depend on a seed.

    Modules use torch's global generator, whose state is restored afterwards.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def laid_out_for(module: nn.Module, device: torch.device, *, narrow: bool) -> None:
    """Give a module's weights the memory layout that suits a device and its arithmetic, `narrow` if not float32.

    That is channels last: on a GPU for its tensor cores, on a CPU because an autoencoder then encodes up to twice as
    fast. Only bfloat16 convolutions on a CPU would be 1.4 times slower.
    """
    import torch

    from latentdiff.networks.layout import lay_out

    lay_out(module, torch.contiguous_format if narrow and device.type == "cpu" else torch.channels_last)


def image_channels(config: Config) -> int:
    """3 for colour, 1 for grey."""
    return 1 if config.data.grey else 3


def new_codec(config: Config) -> AnyCodec:
    """A codec with random weights, or the identity."""
    from latentdiff.networks.codecs.identity import IdentityCodec
    from latentdiff.networks.codecs.kl import KLAutoencoder
    from latentdiff.networks.codecs.tiny import TinyAutoencoder

    settings = config.autoencoder
    if settings.kind == "identity":
        return IdentityCodec(image_channels(config))
    kind = TinyAutoencoder if settings.kind == "tiny" else KLAutoencoder
    return kind.create(
        settings.block_out_channels,
        settings.layers_per_block,
        settings.latent_channels,
        settings.norm_num_groups,
        image_channels(config),
    )


def new_tokenizer(config: Config, captions: Iterable[str]) -> Tokenizer:
    """CLIP's tokenizer, or one whose merges are learnt from the first captions of the training set."""
    from latentdiff.networks.encoders.clip import clip_tokenizer, learnt_tokenizer

    if config.clip.merges is None:
        return clip_tokenizer(config.clip.max_length)
    return learnt_tokenizer(islice(captions, _CAPTIONS), config.clip.merges, config.clip.max_length)


def new_clip(config: Config, vocabulary: int | None = None) -> Clip:
    """Both towers with random weights. vocabulary: the number of words, by default as many as the config allows."""
    from latentdiff.networks.clip import BYTES, VOCABULARY, Clip

    if vocabulary is None:
        vocabulary = VOCABULARY if config.clip.merges is None else BYTES + config.clip.merges
    settings = config.clip.model_dump(exclude={"training", "merges"})
    return Clip.create(image_size=config.image_size, vocabulary=vocabulary, **settings)


def new_unet(config: Config, channels: int, side: int) -> UNet:
    """A U-Net with random weights for latents (channels, side, side) and the text encoder's tokens."""
    from latentdiff.networks.backbones.unet import UNet

    settings = config.denoiser
    return UNet.create(
        sample_size=side,
        channels=channels,
        context_dim=config.clip.text_width,
        block_out_channels=settings.block_out_channels,
        attention=settings.attention,
        layers_per_block=settings.layers_per_block,
        num_heads=settings.num_heads,
        norm_num_groups=settings.norm_num_groups,
        pooled_text=settings.pooled_text,
        beside=_beside(config, channels),
        classes=settings.schedule.num_train_timesteps if settings.enlarging.scale > 1 else None,
    )


def _beside(config: Config, channels: int) -> int:
    """The number of channels that the U-Net reads beside its latents, which have `channels`."""
    denoiser = config.denoiser
    if denoiser.enlarging.scale > 1:
        return image_channels(config)
    return channels if denoiser.editing.source else channels + 1 if denoiser.inpainting else 0


def new_enlarging(config: Config) -> Enlarging | None:
    """How the config's model enlarges; None if it draws. The small picture is noised along the config's schedule."""
    settings, schedule = config.denoiser.enlarging, config.denoiser.schedule
    if settings.scale == 1:
        return None
    path = schedule_named(schedule.kind, schedule.num_train_timesteps)
    return Enlarging(settings.scale, path, settings.times, usual=min(20, settings.times - 1))


def new_backbone(config: Config, channels: int, side: int, classes: int) -> UNet | DiT:
    """The network of the config with random weights, for latents (channels, side, side); see `new_unet`."""
    if config.reads_texts:
        return new_unet(config, channels, side)
    from latentdiff.networks.backbones.dit import DiT

    return DiT.create(sample_size=side, channels=channels, classes=classes, **config.denoiser.dit.model_dump())


def new_path(config: Config) -> Path:
    """The noise levels between pictures and noise."""
    settings = config.denoiser.schedule
    if config.denoiser.path == "straight":
        return Straight(config.denoiser.shift, T=settings.num_train_timesteps)
    schedule = schedule_named(settings.kind, settings.num_train_timesteps)
    return schedule.zero_terminal_snr() if settings.zero_terminal_snr else schedule


def times_of(learning: Learning, path: Path) -> Times:
    """The distribution of training times."""
    return Times(path, learning.times, learning.logit_mean, learning.logit_std)


def new_model(config: Config, codec: AnyCodec, text_encoder: TextEncoder | ClassLabels, backbone: UNet | DiT) -> Model:
    """The model of trained networks, with the config's name, size and recommended settings."""
    size = (config.image_size, config.image_size)
    card = ModelCard(name=config.name, size=size, defaults=config.recommended.model_dump())
    networks: Any = (backbone.eval(), text_encoder.eval(), codec)
    path, prediction = new_path(config), config.denoiser.prediction
    if not config.reads_texts:
        names = list(networks[1].names)
        return dit.assembled(networks[0], names, codec, path, prediction, card, FilePath(config.name))
    enlarging = new_enlarging(config)
    facts: dict[str, Any] = {"path": path, "prediction": prediction, "card": card, "where": FilePath(config.name)}
    model = stable_diffusion.assembled(*networks, **facts, enlarging=enlarging)
    return replace(model, family=FAMILY if enlarging is None else upscaler.FAMILY)


def check_networks(config: Config) -> None:
    """Build every network and run it once on the meta device, to find sizes that do not fit before hours of training.

    Raises ConfigError.
    """
    import torch

    from latentdiff.networks.conditions import Conditions

    side, crop = config.image_size, min(config.autoencoder.crop, config.image_size)
    with torch.device("meta"):
        with _described("autoencoder"):
            codec = new_codec(config)
            if side % codec.factor or crop % codec.factor:
                raise ConfigError(f"image_size and autoencoder.crop must be multiples of {codec.factor}")
            codec.decode(codec.encode(torch.zeros(1, image_channels(config), crop, crop))[0])
        if config.reads_texts:
            with _described("clip"):
                ids = torch.zeros(2, config.clip.max_length, dtype=torch.long)
                new_clip(config)(torch.zeros(2, 3, side, side), ids)
        with _described("denoiser"):
            latents = torch.zeros(1, codec.latent_channels, side // codec.factor, side // codec.factor)
            backbone = new_backbone(config, latents.shape[1], latents.shape[2], 1)
            if latents.shape[2] % backbone.spec.multiple:
                raise ConfigError(f"denoiser.dit.patch_size must divide {latents.shape[2]} latents")
            step = config.data.pictures.bucket_step
            if step and (step % codec.factor or backbone.spec.square):
                most = f"a multiple of {codec.factor}" if not backbone.spec.square else "unset: a dit draws squares"
                raise ConfigError(f"data.pictures.bucket_step must be {most} (got {step})")
            tokens = torch.zeros(1, config.clip.max_length, config.clip.text_width)
            arrays = {"tokens": tokens, "label": torch.zeros(1)}
            x = torch.zeros(1, backbone.spec.inputs, *latents.shape[2:])
            backbone(x, 0, Conditions({name: arrays[name] for name in backbone.spec.reads}))


def _described(section: str) -> AbstractContextManager[None]:
    return raised_as(ConfigError, f"{section}: no network can be built as the config describes it")
