"""The three stages of a run: what each draws from the scenes, trains, reports and leaves in the run folder.

Networks come from `build`, pictures from `data`, losses and the loop from `training`; none of those know each other.
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

from latentdiff.build import (
    AnyAutoencoder,
    new_autoencoder,
    new_clip,
    new_pipeline,
    new_schedule,
    new_unet,
)
from latentdiff.config import Config, flat, load_config
from latentdiff.data import oracle, scenes
from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.errors import ConfigError, DataError
from latentdiff.evaluation.composition import evaluate_composition, evaluation_scenes
from latentdiff.images import luminance, to_images, to_uint8
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.clip import Clip, text_model_of
from latentdiff.models.text_encoder import TextEncoder, clip_tokenizer, tokenize
from latentdiff.models.unet import UNet
from latentdiff.models.weights import load_autoencoder, load_text_encoder, weights_hash
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.training.autoencoder import AutoencoderStage, psnr
from latentdiff.training.checkpoint import checkpoints
from latentdiff.training.clip import CaptionedPicture, ClipStage
from latentdiff.training.denoiser import ConditionedNetwork, DenoiserStage, LatentSet
from latentdiff.training.run import run_stage

VALIDATION = 128  # pictures that a validation looks at


def training_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of the run's training set; endless."""
    return scenes.scene(noise.generator(config.seed, "training scene", index), mix=config.data.mix)


def validation_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of a set that training never draws, of the same distribution."""
    return scenes.scene(noise.generator(config.seed, "validation scene", index), mix=config.data.mix)


def pictures_of(config: Config, chosen: Sequence[scenes.Scene]) -> np.ndarray:
    """Rendered scenes, uint8 (N, S, S, C), as the config wants them: its size, colour or grey."""
    rendered = np.stack([scenes.render(scene, config.image_size) for scene in chosen])
    return luminance(rendered) if config.data.grey else rendered


def readable(config: Config) -> bool:
    """Whether the oracle can read this model's pictures."""
    return config.image_size == scenes.SIZE and not config.data.grey


# --- stage 1: the autoencoder --------------------------------------------------------------------------


def train_autoencoder(config: Config, run: Path) -> None:
    """Train the VAE, whiten its latents and save it as `run/model/vae`."""
    settings = config.autoencoder
    if settings.kind == "identity":
        return
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    torch.manual_seed(config.seed)  # initial weights are drawn by torch's modules themselves
    module = new_autoencoder(config).to(memory_format=torch.channels_last)
    assert isinstance(module, Autoencoder)
    crop = min(settings.crop, config.image_size)
    stage = AutoencoderStage(
        module,
        lambda index: pictures_of(config, [training_scene(config, index)])[0],
        seed=config.seed,
        batch_size=settings.training.train_batch_size,
        crop=crop,
        latent_shape=(module.latent_channels, crop // module.factor, crop // module.factor),
        gradient_weight=settings.gradient_weight,
        kl_weight=settings.kl_weight,
        device=accelerator.device,
    )
    report = partial(_autoencoder_report, config, accelerator.device)
    trained = run_stage(accelerator, stage, settings.training, run / "autoencoder", report)
    assert isinstance(trained, Autoencoder)
    trained.fold_statistics(*latent_statistics(trained, config, accelerator.device))
    trained.save(run / "model" / "vae")


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel (C,), over posterior samples of 512 training pictures."""
    images = to_images(pictures_of(config, [training_scene(config, index) for index in range(512)])).to(device)
    encoded = [autoencoder.encode(batch) for batch in torch.split(images, 64)]
    mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    center = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
    return center, variance.sqrt()


@torch.no_grad()
def _autoencoder_report(config: Config, device: torch.device, step: int, module: nn.Module) -> dict[str, float]:
    """PSNR and, where the oracle can read, the share of reconstructed validation scenes still read right."""
    assert isinstance(module, Autoencoder)
    module.eval()
    chosen = [validation_scene(config, index) for index in range(VALIDATION)]
    images = to_images(pictures_of(config, chosen)).to(device)
    decoded = torch.cat([module.decode(module.encode(batch)[0]) for batch in torch.split(images, 32)])
    quality = {"psnr": psnr(images, decoded)}
    if readable(config):
        pairs = zip(to_uint8(decoded), chosen, strict=True)
        right = [oracle.satisfies(oracle.read(picture), scene.description) for picture, scene in pairs]
        quality["read_right"] = float(np.mean(right))
    return quality


# --- stage 2: CLIP, whose text tower becomes the text encoder ------------------------------------------


def train_clip(config: Config, run: Path) -> None:
    """Train both towers; save the text tower in transformers' format in `run/clip`, both as `run/model/clip`."""
    settings = config.clip
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    torch.manual_seed(config.seed)
    module = new_clip(config)
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
        first = scenes.scene(rng, mix=config.data.mix)
        second = scenes.compose(scenes.twin(first.description, rng), rng)
        pairs += [(scenes.render(scene, config.image_size), scene.caption) for scene in (first, second)]
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


def train_denoiser(config: Config, run: Path) -> None:
    """Train the U-Net (and the text encoder, by choice) on cached latents; completes `run/model`."""
    settings = config.denoiser
    for stage_before, part in (("autoencoder", run / "model" / "vae"), ("clip", run / "clip" / "text_encoder")):
        if not part.is_dir() and not (stage_before == "autoencoder" and config.autoencoder.kind == "identity"):
            raise ConfigError(f"the denoiser needs the {stage_before} of the same run ({part}). Train that stage first")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    identity = config.autoencoder.kind == "identity"
    autoencoder = new_autoencoder(config) if identity else load_autoencoder(run / "model")
    text_encoder = load_text_encoder(run / "clip")
    made_from = f"{weights_hash(autoencoder)} {weights_hash(text_encoder)}"
    latents = cached_latents(config, run / "cache", autoencoder, text_encoder, accelerator.device)
    torch.manual_seed(config.seed)
    unet = new_unet(config, latents.mean.shape[1], latents.mean.shape[-1]).to(memory_format=torch.channels_last)
    if accelerator.device.type == "cpu":
        unet.use_plain_attention()
    schedule = new_schedule(config)
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
    trained = run_stage(accelerator, stage, settings.training, run / "denoiser", report, made_from)
    assert isinstance(trained, ConditionedNetwork)
    _pipeline_of(config, trained, autoencoder).save_pretrained(run / "model")


@torch.no_grad()
def cached_latents(
    config: Config, cache: Path, autoencoder: AnyAutoencoder, text_encoder: TextEncoder, device: torch.device
) -> LatentSet:
    """Posterior moments and token ids of the training set, encoded once and kept in `cache`.

    The file's name holds a hash of the autoencoder's weights and what the set is: another model or set is another file.
    """
    autoencoder.to(device)
    shown = f"{config.data.count}x{config.image_size}{'-grey' if config.data.grey else ''}-{text_encoder.max_length}"
    mix = "-".join(f"{share:g}" for share in config.data.mix)
    path = cache / f"latents-{weights_hash(autoencoder)[:16]}-seed{config.seed}-{shown}-mix{mix}.safetensors"
    if not path.exists():
        parts = [
            _encode_scenes(config, range(first, min(first + 64, config.data.count)), autoencoder, text_encoder, device)
            for first in tqdm(range(0, config.data.count, 64), "encoding", unit="batch")
        ]
        cache.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".tmp")
        save_file({name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}, partial_path)
        partial_path.rename(path)
    try:
        return LatentSet(**load_file(path))
    except Exception as error:
        raise DataError(f"cached latents cannot be read ({path}). Delete the file; they are made again") from error


def _encode_scenes(
    config: Config, indices: range, autoencoder: AnyAutoencoder, text_encoder: TextEncoder, device: torch.device
) -> dict[str, Tensor]:
    chosen = [training_scene(config, index) for index in indices]
    images = to_images(pictures_of(config, chosen))
    mean, log_variance = autoencoder.encode(images.to(device))
    return {
        "mean": mean.half().cpu(),
        "log_variance": log_variance.half().cpu(),
        "ids": text_encoder.tokenize([scene.caption for scene in chosen]),
    }


def _pipeline_of(config: Config, trained: ConditionedNetwork, autoencoder: AnyAutoencoder) -> LatentDiffusionPipeline:
    assert isinstance(trained.unet, UNet) and isinstance(trained.text_encoder, TextEncoder)
    return new_pipeline(config, autoencoder, trained.text_encoder, trained.unet)


def _denoiser_report(
    config: Config, directory: Path, autoencoder: AnyAutoencoder, step: int, module: nn.Module
) -> dict[str, float]:
    """Pictures at fixed prompts and seeds in `directory`, a row a category, and their composition scores where the
    oracle can read them.
    """
    assert isinstance(module, ConditionedNetwork)
    module.eval()
    pipe = _pipeline_of(config, module, autoencoder)
    scores: dict[str, float] = {}
    if readable(config):
        score = evaluate_composition(pipe, pictures=config.denoiser.preview_pictures, seed=config.seed)
        rows = [pictures[:8] for pictures in score.pictures.values()]
        scores = {"composition": score.overall} | {name: share.mean for name, share in score.categories.items()}
    else:
        rows = [_preview_row(config, pipe, category) for category in scenes.CATEGORIES]
    directory.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet).save(directory / f"step-{step:08d}.png")
    return scores


def _preview_row(config: Config, pipe: LatentDiffusionPipeline, category: str) -> np.ndarray:
    captions = [scene.caption for scene in evaluation_scenes(category, 8, config.seed)]
    pictures: np.ndarray = pipe(captions, seed=config.seed, output_type="np").images
    return pictures


def check_unchanged(config: Config, run: Path) -> None:
    """Refuse to go on with a stage under other settings than it was begun with. Raises ConfigError.

    How long, how often saved and how drawn may change, and everything of a stage that has no checkpoint yet.
    """
    path = run / "config.toml"
    begun = [name for name in STAGES if checkpoints(run / name / "checkpoints")]
    if not begun or not path.is_file():
        return
    before, now = flat(load_config(path)), flat(config)
    for key, value in now.items():
        section, name = key.split(".")[0], key.split(".")[-1]
        free = section in ("name", "recommended") or name in FREE or (section in STAGES and section not in begun)
        if value != before[key] and not free:
            raise ConfigError(
                f"{key} is {value!r}, but this run was begun with {before[key]!r} ({path}). Choose another run folder"
            )


FREE = (
    "max_train_steps",
    "lr_decay",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "preview_pictures",
)
STAGES = {"autoencoder": train_autoencoder, "clip": train_clip, "denoiser": train_denoiser}
