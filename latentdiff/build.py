"""The composition root of training: from a config to the stages of a run, and from a run to a model folder.

Networks come from `models`, pictures from `data`, losses from `training`; none of those know each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.config import Config
from latentdiff.config import Schedule as ScheduleSettings
from latentdiff.data import oracle, scenes
from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.schedule import NoiseSchedule, schedule_named
from latentdiff.evaluation.composition import evaluate_composition
from latentdiff.images import to_images, to_uint8
from latentdiff.models.autoencoder import Autoencoder, IdentityAutoencoder
from latentdiff.models.clip import Clip, text_model_of
from latentdiff.models.text_encoder import TextEncoder, clip_tokenizer, tokenize
from latentdiff.models.unet import UNet
from latentdiff.models.weights import load_autoencoder, load_text_encoder, weights_hash
from latentdiff.pipeline import LatentDiffusionPipeline, ModelCard
from latentdiff.training.autoencoder import AutoencoderStage, psnr
from latentdiff.training.clip import CaptionedPicture, ClipStage
from latentdiff.training.denoiser import ConditionedNetwork, DenoiserStage, LatentSet
from latentdiff.training.run import run_stage

AnyAutoencoder = Autoencoder | IdentityAutoencoder
VALIDATION = 128  # pictures that a validation looks at


def training_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of the run's training set; endless."""
    return scenes.scene(noise.generator(config.seed, "training scene", index))


def validation_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of a set that training never draws, of the same distribution."""
    return scenes.scene(noise.generator(config.seed, "validation scene", index))


def _pictures(scene: Callable[[int], scenes.Scene], first: int, count: int) -> np.ndarray:
    return np.stack([scenes.render(scene(index)) for index in range(first, first + count)])


def _accelerator(mixed_precision: str) -> Accelerator:
    return Accelerator(mixed_precision=mixed_precision)


# --- stage 1: the autoencoder --------------------------------------------------------------------------


def train_autoencoder(config: Config, run: Path) -> None:
    """Train the VAE, whiten its latents and save it as `run/model/vae`."""
    settings = config.autoencoder
    if settings.kind == "identity":
        return
    accelerator = _accelerator(settings.training.mixed_precision)
    torch.manual_seed(config.seed)  # initial weights are drawn by torch's modules themselves
    module = Autoencoder.create(
        settings.block_out_channels, settings.layers_per_block, settings.latent_channels, settings.norm_num_groups
    ).to(memory_format=torch.channels_last)
    crop = min(settings.crop, config.image_size)
    stage = AutoencoderStage(
        module,
        lambda index: scenes.render(training_scene(config, index)),
        seed=config.seed,
        batch_size=settings.training.train_batch_size,
        crop=crop,
        latent_shape=(module.latent_channels, crop // module.factor, crop // module.factor),
        gradient_weight=settings.gradient_weight,
        kl_weight=settings.kl_weight,
        device=accelerator.device,
    )
    report = partial(_autoencoder_report, config, run / "autoencoder")
    trained = run_stage(accelerator, stage, settings.training, run / "autoencoder", report)
    assert isinstance(trained, Autoencoder)
    trained.fold_statistics(*latent_statistics(trained, config, accelerator.device))
    trained.save(run / "model" / "vae")


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel (C,), over posterior samples of 512 training pictures."""
    images = to_images(_pictures(partial(training_scene, config), 0, 512)).to(device)
    encoded = [autoencoder.encode(batch) for batch in torch.split(images, 64)]
    mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    center = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
    return center, variance.sqrt()


@torch.no_grad()
def _autoencoder_report(config: Config, directory: Path, step: int, module: nn.Module) -> dict[str, float]:
    """PSNR and the share of reconstructed validation scenes that the oracle still reads right."""
    assert isinstance(module, Autoencoder)
    module.eval()
    chosen = [validation_scene(config, index) for index in range(VALIDATION)]
    images = to_images(np.stack([scenes.render(scene) for scene in chosen]))
    decoded = torch.cat([module.decode(module.encode(b)[0]) for b in torch.split(images, 32)])
    right = [
        oracle.satisfies(oracle.read(picture), scene.description)
        for picture, scene in zip(to_uint8(decoded), chosen, strict=True)
    ]
    return {"psnr": psnr(images, decoded), "read_right": float(np.mean(right))}


# --- stage 2: CLIP, whose text tower becomes the text encoder ------------------------------------------


def train_clip(config: Config, run: Path) -> None:
    """Train both towers; save the text tower in transformers' format in `run/clip`, both as `run/model/clip`."""
    settings = config.clip
    accelerator = _accelerator(settings.training.mixed_precision)
    torch.manual_seed(config.seed)
    fields = settings.model_dump(exclude={"training"})
    module = Clip.create(image_size=config.image_size, **fields)
    tokenizer = clip_tokenizer(settings.max_length)
    to_ids = partial(tokenize, tokenizer)
    stage = ClipStage(
        module,
        lambda index: _captioned_twins(config, index, settings.training.train_batch_size),
        to_ids,
        module.loss,
        accelerator.device,
    )
    report = partial(_clip_report, config, to_ids, accelerator.device)
    trained = run_stage(accelerator, stage, settings.training, run / "clip", report)
    assert isinstance(trained, Clip)
    trained.save(run / "model" / "clip")
    TextEncoder(tokenizer, text_model_of(trained)).save(run / "clip")


def _captioned_twins(
    config: Config, index: int, batch_size: int, purpose: str = "clip scene"
) -> list[CaptionedPicture]:
    """Half a batch of scenes, and of each a twin that differs in one fact."""
    pairs = []
    for number in range(index * batch_size // 2, (index + 1) * batch_size // 2):
        rng = noise.generator(config.seed, purpose, number)
        first = scenes.scene(rng)
        second = scenes.compose(scenes.twin(first.description, rng), rng)
        pairs += [(scenes.render(scene), scene.caption) for scene in (first, second)]
    return pairs


@torch.no_grad()
def _clip_report(
    config: Config, to_ids: Callable[[Sequence[str]], Tensor], device: torch.device, step: int, module: nn.Module
) -> dict[str, float]:
    """Validation loss, the share of captions found among all, and among a picture's own and its twin's."""
    assert isinstance(module, Clip)
    module.eval()
    pictures, captions = zip(*_captioned_twins(config, 0, 2 * VALIDATION, "clip validation"), strict=True)
    images = to_images(np.stack(pictures)).to(device)
    image_features, text_features, scale = module(images, to_ids(captions).to(device))
    similarity = image_features @ text_features.T
    rows = torch.arange(len(images), device=device)
    own, twin = similarity[rows, rows], similarity[rows, rows ^ 1]
    return {
        "validation_loss": float(module.loss(image_features, text_features, scale)),
        "found_of_all": float((similarity.argmax(1) == rows).float().mean()),
        "found_of_twins": float((own > twin).float().mean()),
    }


# --- stage 3: the denoiser -----------------------------------------------------------------------------


def noise_schedule(settings: ScheduleSettings) -> NoiseSchedule:
    """The schedule a config describes."""
    schedule = schedule_named(settings.kind, settings.num_train_timesteps)
    return schedule.zero_terminal_snr() if settings.zero_terminal_snr else schedule


def train_denoiser(config: Config, run: Path) -> None:
    """Train the U-Net (and the text encoder, by choice) on cached latents; completes `run/model`."""
    settings = config.denoiser
    accelerator = _accelerator(settings.training.mixed_precision)
    autoencoder, text_encoder = load_autoencoder(run / "model"), load_text_encoder(run / "clip")
    latents = cached_latents(config, run / "cache", autoencoder.to(accelerator.device), text_encoder)
    torch.manual_seed(config.seed)
    unet = UNet.create(
        sample_size=latents.mean.shape[-1],
        channels=latents.mean.shape[1],
        context_dim=text_encoder.model.config.hidden_size,
        block_out_channels=settings.block_out_channels,
        attention=settings.attention,
        layers_per_block=settings.layers_per_block,
        num_heads=settings.num_heads,
        norm_num_groups=settings.norm_num_groups,
    ).to(memory_format=torch.channels_last)
    schedule = noise_schedule(settings.schedule)
    stage = DenoiserStage(
        ConditionedNetwork(unet, text_encoder, settings.tune_text_encoder),
        DiffusionLoss(schedule, settings.prediction, settings.weighting),
        latents,
        text_encoder.tokenize([""]),
        seed=config.seed,
        batch_size=settings.training.train_batch_size,
        timesteps=schedule.T,
        caption_dropout=settings.caption_dropout,
        device=accelerator.device,
    )
    report = partial(_denoiser_report, config, run / "denoiser" / "samples", autoencoder)
    trained = run_stage(accelerator, stage, settings.training, run / "denoiser", report)
    assert isinstance(trained, ConditionedNetwork)
    assemble(config, trained, autoencoder).save_pretrained(run / "model")


@torch.no_grad()
def cached_latents(config: Config, cache: Path, autoencoder: AnyAutoencoder, text_encoder: TextEncoder) -> LatentSet:
    """Posterior moments and token ids of the training set, encoded once and kept in `cache`.

    The file's name holds a hash of the autoencoder's weights, the seed and the count: another model or set is
    another file.
    """
    digest = weights_hash(autoencoder)
    path = cache / f"latents-{digest[:16]}-{config.seed}-{config.data.count}.safetensors"
    if not path.exists():
        parts = [
            _encode_scenes(config, range(first, min(first + 64, config.data.count)), autoencoder, text_encoder)
            for first in tqdm(range(0, config.data.count, 64), "encoding", unit="batch")
        ]
        cache.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".tmp")
        save_file({name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}, partial_path)
        partial_path.rename(path)
    return LatentSet(**load_file(path))


def _encode_scenes(
    config: Config, indices: range, autoencoder: AnyAutoencoder, text_encoder: TextEncoder
) -> dict[str, Tensor]:
    chosen = [training_scene(config, index) for index in indices]
    images = to_images(np.stack([scenes.render(scene) for scene in chosen]))
    mean, log_variance = autoencoder.encode(images.to(next(text_encoder.parameters()).device))
    return {
        "mean": mean.half().cpu(),
        "log_variance": log_variance.half().cpu(),
        "ids": text_encoder.tokenize([scene.caption for scene in chosen]),
    }


def assemble(config: Config, trained: ConditionedNetwork, autoencoder: AnyAutoencoder) -> LatentDiffusionPipeline:
    """The pipeline of a trained denoiser."""
    assert isinstance(trained.unet, UNet) and isinstance(trained.text_encoder, TextEncoder)
    settings = config.denoiser
    return LatentDiffusionPipeline(
        autoencoder,
        trained.text_encoder.eval(),
        trained.unet.eval(),
        noise_schedule(settings.schedule),
        settings.prediction,
        ModelCard(
            name=config.name,
            size=(config.image_size, config.image_size),
            defaults=config.recommended.model_dump(),
        ),
    )


def _denoiser_report(
    config: Config, directory: Path, autoencoder: AnyAutoencoder, step: int, module: nn.Module
) -> dict[str, float]:
    """A strip of pictures at fixed seeds in `directory`, and the composition score of a few pictures a category."""
    assert isinstance(module, ConditionedNetwork)
    module.eval()
    pipe = assemble(config, module, autoencoder)
    score = evaluate_composition(pipe, pictures=config.denoiser.preview_pictures, seed=config.seed)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(pictures[:8]), 1) for pictures in score.pictures.values()]
    Image.fromarray(np.concatenate(rows)).save(directory / f"step-{step:08d}.png")
    return {"composition": score.overall, **{name: share.mean for name, share in score.categories.items()}}


STAGES = {"autoencoder": train_autoencoder, "clip": train_clip, "denoiser": train_denoiser}
