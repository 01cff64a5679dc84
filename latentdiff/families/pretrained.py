"""A model folder and back: diffusers' layout <-> pipeline. The composition root of inference.

The noise schedule is what diffusers' scheduler config describes; `latentdiff.json` beside it holds what that
format has no place for: the model's name, its size and its recommended sampling settings.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from latentdiff.core.errors import ConfigError, ModelError, saving
from latentdiff.core.files import whole, write_json
from latentdiff.diffusion.path import Path as NoisePath
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.drawing.record import recorded
from latentdiff.families.scheduler import read_json_as, read_scheduler, same_schedule, scheduler_config
from latentdiff.formats.folder import folder_hash, picture_geometry
from latentdiff.pipeline import LatentDiffusionPipeline, ModelCard
from latentdiff.settings.recommended import Recommended

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "scenes-64"
Model = TypeVar("Model", bound=BaseModel)
_PLAIN = {"sampler": "dpmpp_2m", "spacing": "trailing"}  # of a file that says nothing of it


def default_model() -> Path:
    """The folder of the default model: inside the package, or in `assets/` of a source checkout."""
    package = Path(str(files("latentdiff")))
    for folder in (package / "assets" / DEFAULT_MODEL, package.parent / "assets" / DEFAULT_MODEL):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelError(f"the default model {DEFAULT_MODEL} is not in this installation ({package}). Name a model folder")


def load_pipeline(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> LatentDiffusionPipeline:
    """See LatentDiffusionPipeline.from_pretrained."""
    import torch

    from latentdiff.runtime.device import check_dtype, usable_device

    where = usable_device(device)
    check_dtype(dtype)
    return stored_pipeline(path, variant, revision).to(where, dtype or torch.float32)


def stored_pipeline(
    path: str | Path | None, variant: str | None = None, revision: str | None = None
) -> LatentDiffusionPipeline:
    """A model on the CPU in the precision in which it is stored."""
    source = located(path, variant, revision)
    pipe = _of_file(source) if source.path.is_file() else _of_folder(source, variant)
    _check_channels(pipe, source.path)
    return pipe


class Located(NamedTuple):
    """A model on this disk: its file or folder, its name, and how it was asked for (None: the default model)."""

    path: Path
    name: str
    source: str | None


def located(path: str | Path | None, variant: str | None = None, revision: str | None = None) -> Located:
    """The default model, a path, or a hub id, fetched where it is not in the cache yet. Raises ModelError."""
    from latentdiff.formats.hub import fetched, is_hub_id

    if revision is not None and (path is None or not is_hub_id(str(path))):
        raise ConfigError(
            f"revision is of hub ids, not of {'the default model' if path is None else f'a path ({path})'}"
        )
    if path is None:
        return Located(default_model(), DEFAULT_MODEL, None)
    if not isinstance(path, str | Path) or not _can_be(Path(path)):
        raise ModelError(f"no such model ({str(path)[:80]!r}). Give a folder, a file or a hub id")
    if is_hub_id(str(path)):
        folder = fetched(str(path), revision, variant)
        return Located(folder, str(path), f"{path}@{folder.name}")  # the folder of a commit is called by it
    place = Path(path)
    name = place.stem if place.is_file() else place.resolve().name
    return Located(place, name, recorded(place))


def _can_be(path: Path) -> bool:
    """Whether a path may name something: not longer than names can be, and without NUL."""
    try:
        path.exists()
    except (OSError, ValueError):
        return False
    return True


def _of_folder(source: Located, variant: str | None) -> LatentDiffusionPipeline:
    from latentdiff.formats import folder
    from latentdiff.formats.weights import load_networks

    folder.check_folder(source.path)
    schedule, prediction, _ = read_scheduler(source.path)
    card = card_of(source, schedule, variant)
    return LatentDiffusionPipeline(*load_networks(source.path, variant), schedule, prediction, card)


def card_of(source: Located, schedule: NoisePath, variant: str | None) -> ModelCard:
    """What a checked folder says of itself, under the name and from the place by which it was asked for."""
    card = read_card(source.path, schedule, variant)
    named = source.name if card.name == source.path.resolve().name else card.name
    return replace(card, name=named, source=source.source, variant=variant)


def _of_file(source: Located) -> LatentDiffusionPipeline:
    from latentdiff.core.files import sha256_of
    from latentdiff.formats.single_file import load_single_file

    found = load_single_file(source.path)
    schedule = VariancePreserving.scaled_linear()
    side = int(found.unet.model.config.sample_size) * found.autoencoder.factor
    card = ModelCard(source.name, sha256_of(source.path), (side, side), dict(_PLAIN), source.source)
    return LatentDiffusionPipeline(
        found.autoencoder,
        found.text_encoder,
        found.unet,
        schedule.zero_terminal_snr() if found.zero_terminal_snr else schedule,
        found.prediction,
        card,
    )


def _check_channels(pipe: LatentDiffusionPipeline, path: Path) -> None:
    """A U-Net of latents, or for inpainting of latents, a mask and what it hides. Raises ModelError."""
    from latentdiff.networks.encoders.two_clips import DualTextEncoder

    latents, read = pipe.autoencoder.latent_channels, pipe.unet.in_channels
    if read not in (latents, 2 * latents + 1):
        raise ModelError(f"a U-Net that reads {read} channels does not fit latents of {latents} ({path})")
    if pipe.unet.reads_sizes != isinstance(pipe.text_encoder, DualTextEncoder):
        raise ModelError(f"a U-Net of SDXL goes with two text encoders, others with one ({path})")


class _Card(BaseModel):
    """latentdiff.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    size: tuple[Annotated[int, Field(ge=8, le=2048)], Annotated[int, Field(ge=8, le=2048)]]
    defaults: Recommended | None


def read_card(directory: Path, schedule: NoisePath, variant: str | None = None) -> ModelCard:
    """Name, hash, size and recommended settings; without latentdiff.json the scheduler's config says what is usual."""
    multiple, side = picture_geometry(directory)
    path, found = directory / "latentdiff.json", folder_hash(directory, variant)
    if not path.is_file():
        usual = read_scheduler(directory).recommended
        return ModelCard(directory.resolve().name, found, side, usual, folder=directory)
    card = read_json_as(_Card, path)
    if any(length % multiple for length in card.size):
        raise ModelError(f"size {card.size} is not of multiples of {multiple} ({path})")
    defaults = card.defaults.model_dump(exclude_unset=True) if card.defaults else {}
    if defaults.get("num_inference_steps", 1) > schedule.T:
        raise ModelError(f"{defaults['num_inference_steps']} steps recommended of {schedule.T} times ({path})")
    return ModelCard(card.name, found, card.size, defaults, folder=directory)


def save_pipeline(pipe: LatentDiffusionPipeline, directory: Path) -> None:
    """Write the folder: networks, tokenizer, scheduler, model_index, latentdiff.json, and the CLIP it came with.

    Raises ConfigError where adapters are beside the weights: no folder holds both.
    """
    _check_saveable(pipe)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; a model is a folder")
    with saving("the model", directory.parent), whole(directory) as made:
        clip = None if pipe.card.folder is None else pipe.card.folder / "clip"
        if clip is not None and clip.is_dir() and not (directory / "clip").exists():
            shutil.copytree(clip, made / "clip")
        pipe.unet.save(made / "unet")
        pipe.text_encoder.save(made)
        pipe.autoencoder.save(made / "vae")
        write_json(
            made / "scheduler" / "scheduler_config.json",
            scheduler_config(pipe.path, pipe.prediction, pipe.card.defaults.get("spacing", "leading")),
        )
        write_json(made / "model_index.json", _index(pipe, with_vae=(made / "vae").is_dir()))
        card = {"name": pipe.card.name, "size": list(pipe.card.size), "defaults": pipe.card.defaults or None}
        write_json(made / "latentdiff.json", card)


def _check_saveable(pipe: LatentDiffusionPipeline) -> None:
    sources = pipe.extras.sources.items()
    beside = [name.removeprefix("adapter ") for name, source in sources if source.kind == "lora"]
    if beside:
        raise ConfigError(f"adapters are beside the weights ({', '.join(beside)}): fuse_lora or unload_lora_weights")


def save_single_file(pipe: LatentDiffusionPipeline, path: Path) -> None:
    """Write one .safetensors file in the original layout of Stable Diffusion.

    Raises ConfigError for a model whose shape, schedule or scale that layout cannot hold.
    """
    from latentdiff.formats import original

    _check_saveable(pipe)
    own = pipe.path
    plain = VariancePreserving.scaled_linear(own.T)
    kinds = {False: plain, True: plain.zero_terminal_snr()}
    of_its_kind = isinstance(own, VariancePreserving) and own.T == 1000
    same = [zero for zero, kind in kinds.items() if of_its_kind and same_schedule(kind, own)]
    if not same:
        raise ConfigError("the noise schedule is not Stable Diffusion's, which a single file implies. Use a folder")
    original.save_single_file(
        path,
        pipe.autoencoder,
        pipe.text_encoder,
        pipe.unet,
        prediction=pipe.prediction,
        zero_terminal_snr=same[0],
    )


def _index(pipe: LatentDiffusionPipeline, *, with_vae: bool) -> dict[str, Any]:
    """Which of diffusers' pipelines reads the folder, and the class of each part."""
    from latentdiff.networks.encoders.two_clips import DualTextEncoder

    inpainting = "Inpaint" if pipe.unet.in_channels != pipe.autoencoder.latent_channels else ""
    shared = {
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", type(pipe.autoencoder.vae).__name__] if with_vae else [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if isinstance(pipe.text_encoder, DualTextEncoder):
        return {
            "_class_name": f"StableDiffusionXL{inpainting}Pipeline",
            **shared,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": pipe.text_encoder.zero_empty,
        }
    return {
        "_class_name": f"StableDiffusion{inpainting}Pipeline",
        **shared,
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
