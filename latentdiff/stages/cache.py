"""The training set as the denoiser takes it: latents' moments and captions, encoded once or in every step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from latentdiff.build import AnyAutoencoder
from latentdiff.config import Config
from latentdiff.errors import DataError
from latentdiff.images import to_images
from latentdiff.models.folder import let_others_read, saving
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.weights import weights_hash
from latentdiff.stages.pictures import VALIDATION, fingerprint, pictures_of, training_scene, validation_scene
from latentdiff.stages.run import Run
from latentdiff.training.denoiser import CachedLatents, EncodedLatents, Latents, Texts


def training_latents(run: Run, autoencoder: AnyAutoencoder) -> Latents:
    """Of the training set: from `run/cache`, or encoded as they are needed where the config says so."""
    config, accelerator = run.config, run.accelerator
    if config.denoiser.cache:
        with accelerator.main_process_first():
            cached = cached_latents(config, run.folder / "cache", autoencoder, accelerator.device)
        return _where_it_fits(cached, accelerator.device)
    side = config.image_size // autoencoder.factor
    return EncodedLatents(
        lambda rows: pictures_of(config, [training_scene(config, row) for row in rows]),
        config.data.count,
        (autoencoder.latent_channels, side, side),
        autoencoder.to(accelerator.device).encode,
    )


def validation_latents(config: Config, autoencoder: AnyAutoencoder, device: torch.device) -> CachedLatents:
    """Of the validation set."""
    images = to_images(pictures_of(config, [validation_scene(config, index) for index in range(VALIDATION)]))
    return CachedLatents(*_encoded(images, autoencoder.to(device), device)).to(device)


def texts_of(captions: list[str], text_encoder: TextEncoder, device: torch.device, *, contexts: bool) -> Texts:
    """Captions as token ids, or as contexts where the text encoder is not trained: equal ones are kept once."""
    unique, of_row = np.unique(captions, return_inverse=True)
    ids, empty = text_encoder.tokenize(list(map(str, unique))), text_encoder.tokenize([""])
    if contexts:
        text_encoder.to(device)
        with torch.no_grad():
            encoded = [text_encoder(batch.to(device)).half().cpu() for batch in torch.split(ids, 256)]
            ids, empty = torch.cat(encoded), text_encoder(empty.to(device)).half().cpu()
    return Texts(ids, torch.from_numpy(of_row), empty).to(device)


def captions_of(config: Config) -> list[str]:
    """Of the training set."""
    return [training_scene(config, index).caption for index in range(config.data.count)]


@torch.no_grad()
def cached_latents(config: Config, cache: Path, autoencoder: AnyAutoencoder, device: torch.device) -> CachedLatents:
    """Posterior moments of the training set, encoded once and kept in `cache`.

    The file's name holds a hash of the autoencoder's weights and the set's: another model or set is another file.
    """
    path = cache / f"latents-{weights_hash(autoencoder)[:16]}-{fingerprint(config)['sha256'][:16]}.safetensors"
    if not path.exists():
        autoencoder.to(device)
        count, moments = config.data.count, []
        for first in tqdm(range(0, count, 64), "encoding", unit="batch"):
            chosen = [training_scene(config, index) for index in range(first, min(first + 64, count))]
            moments.append(_encoded(to_images(pictures_of(config, chosen)), autoencoder, device))
        mean, log_variance = (torch.cat(parts) for parts in zip(*moments, strict=True))
        cache.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".tmp-{path.name}")
        with saving("the cached latents", cache):
            save_file(
                {"mean": mean, "log_variance": log_variance}, partial_path, {"sha256": _sha256(mean, log_variance)}
            )
            let_others_read(cache)
            partial_path.rename(path)
    return _read(path)


def _read(path: Path) -> CachedLatents:
    """What was written, every byte of it. Raises DataError."""
    try:
        with safe_open(path, "pt") as file:
            mean, log_variance = file.get_tensor("mean"), file.get_tensor("log_variance")
            if (file.metadata() or {}).get("sha256") != _sha256(mean, log_variance):
                raise ValueError("not the bytes that were written")
    except Exception as error:
        raise DataError(f"cached latents cannot be read ({path}). Delete the file; they are made again") from error
    return CachedLatents(mean, log_variance)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _encoded(images: Tensor, autoencoder: AnyAutoencoder, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moments in half precision on the CPU, computed in float32, 64 pictures at a time."""
    encoded = [autoencoder.encode(batch.to(device)) for batch in torch.split(images, 64)]
    mean, log_variance = (torch.cat(parts).half().cpu().contiguous() for parts in zip(*encoded, strict=True))
    return mean, log_variance


def _where_it_fits(latents: CachedLatents, device: torch.device) -> CachedLatents:
    """On the GPU, where they take less than a quarter of its free memory."""
    if device.type == "cuda" and latents.mean.nbytes * 2 < torch.cuda.mem_get_info(device)[0] / 4:
        return latents.to(device)
    return latents
