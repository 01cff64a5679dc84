"""A model folder and back: diffusers' layout <-> pipeline. The composition root of inference.

The noise schedule is what diffusers' scheduler config describes; `latentdiff.json` beside it holds what that
format has no place for: the model's name, its size and its recommended sampling settings.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.diffusion.denoiser import PREDICTIONS
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ModelError
from latentdiff.pipeline import LatentDiffusionPipeline, ModelCard

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "scenes-64"
_KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def default_model() -> Path:
    """The folder of the default model: inside the package, or in `assets/` of a source checkout."""
    package = Path(str(files("latentdiff")))
    for folder in (package / "assets" / DEFAULT_MODEL, package.parent / "assets" / DEFAULT_MODEL):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelError(f"the default model {DEFAULT_MODEL} is not in this installation ({package}). Name a model folder")


def load_pipeline(
    path: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype | None = None
) -> LatentDiffusionPipeline:
    """See LatentDiffusionPipeline.from_pretrained."""
    import torch

    from latentdiff.models import weights

    directory = default_model() if path is None else Path(path)
    weights.check_folder(directory)
    schedule, prediction = read_scheduler(directory)
    autoencoder = weights.load_autoencoder(directory)
    text_encoder, unet = weights.load_text_encoder(directory), weights.load_unet(directory)
    card = read_card(directory, weights.folder_hash(directory), unet.model.config.sample_size * autoencoder.factor)
    pipe = LatentDiffusionPipeline(autoencoder, text_encoder, unet, schedule, prediction, card)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype or torch.float32)


def read_scheduler(directory: Path) -> tuple[NoiseSchedule, str]:
    """The noise schedule and the prediction of diffusers' scheduler config. Raises ModelError."""
    path = directory / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"scheduler/scheduler_config.json is missing ({directory})") from None
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ModelError(f"unknown prediction_type {prediction!r} ({path}). Known: {', '.join(PREDICTIONS)}")
    return schedule_from_diffusers(config, path), prediction


def schedule_from_diffusers(config: dict[str, Any], path: Path) -> NoiseSchedule:
    """The schedule of a diffusers scheduler config; `trained_betas` is how other kinds are written there."""
    T = int(config.get("num_train_timesteps", 1000))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        import numpy as np

        schedule = NoiseSchedule.from_betas(np.asarray(config["trained_betas"], np.float64))
    elif kind == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(T)
    elif kind in ("linear", "scaled_linear"):
        make = NoiseSchedule.linear if kind == "linear" else NoiseSchedule.scaled_linear
        schedule = make(T, config.get("beta_start", 0.0001), config.get("beta_end", 0.02))
    else:
        raise ModelError(f"unknown beta_schedule {kind!r} ({path}). Known: {', '.join(_KINDS)}")
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def read_card(directory: Path, digest: str, side: int) -> ModelCard:
    """Name, size and recommended settings; a folder without latentdiff.json has diffusers' defaults."""
    path = directory / "latentdiff.json"
    if not path.is_file():
        return ModelCard(directory.resolve().name, digest, (side, side))
    tree = json.loads(path.read_text(encoding="utf-8"))
    return ModelCard(tree["name"], digest, tuple(tree["size"]), tree["defaults"])


def save_pipeline(pipe: LatentDiffusionPipeline, directory: Path) -> None:
    """Write the folder: networks, tokenizer, scheduler, model_index and latentdiff.json."""
    directory.mkdir(parents=True, exist_ok=True)
    pipe.unet.save(directory / "unet")
    pipe.text_encoder.save(directory)
    pipe.autoencoder.save(directory / "vae")
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler_config(pipe))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", "AutoencoderKL"] if (directory / "vae").is_dir() else [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    _write_json(directory / "model_index.json", index)
    card = {"name": pipe.card.name, "size": list(pipe.card.size), "defaults": pipe.card.defaults}
    _write_json(directory / "latentdiff.json", card)


def scheduler_config(pipe: LatentDiffusionPipeline) -> dict[str, Any]:
    """Diffusers' DDIM config of a pipeline's schedule, with betas in full where no kind of theirs describes it."""
    spacing = pipe.card.defaults.get("spacing", "leading")
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": pipe.schedule.T,
        "prediction_type": pipe.prediction,
        "timestep_spacing": spacing if spacing in ("leading", "linspace") else "trailing",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        **_described(pipe.schedule),
    }


def _described(schedule: NoiseSchedule) -> dict[str, Any]:
    """The kind and flags under which diffusers computes the same schedule, or its betas."""
    import numpy as np

    known = {
        "linear": NoiseSchedule.linear(schedule.T),
        "scaled_linear": NoiseSchedule.scaled_linear(schedule.T),
        "squaredcos_cap_v2": NoiseSchedule.cosine(schedule.T),
    }
    ranges = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": (0.0001, 0.02)}
    for kind, plain in known.items():
        for rescaled in (False, True):
            candidate = plain.zero_terminal_snr() if rescaled else plain
            if np.allclose(candidate.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-9, atol=1e-12):
                start, end = ranges[kind]
                return {
                    "beta_schedule": kind,
                    "beta_start": start,
                    "beta_end": end,
                    "rescale_betas_zero_snr": rescaled,
                }
    return {"trained_betas": schedule.betas.tolist(), "rescale_betas_zero_snr": False}


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
