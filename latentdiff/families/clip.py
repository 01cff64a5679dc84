"""CLIP read from folders: the one beside a model trained here, and open_clip's."""

from __future__ import annotations

import json
from pathlib import Path

from latentdiff.core.errors import ConfigError, ModelError, loading
from latentdiff.core.files import sha256_of
from latentdiff.families.weights import load_clip, load_tokenizer
from latentdiff.formats.folder import check_json
from latentdiff.networks.clip import Clip
from latentdiff.networks.encoders.clip import clip_tokenizer
from latentdiff.networks.scorer import OURS, Scorer

WEIGHTS = "open_clip_model.safetensors"


def load_own_scorer(folder: Path, text_encoder: Path | None = None) -> Scorer:
    """The CLIP of a model folder, with the token embeddings of the model's text encoder. Raises ModelError."""
    return Scorer(load_clip(folder, text_encoder), load_tokenizer(text_encoder or folder))


def load_scorer(directory: Path) -> Scorer:
    """CLIP in open_clip's format: a folder of open_clip_config.json and open_clip_model.safetensors.

    Raises ModelError, UnsafeError.
    """
    path = directory / "open_clip_config.json"
    if not path.is_file():
        raise ModelError(f"no CLIP in open_clip's format at {directory}. It is a folder with {path.name}")
    with loading("clip", directory):
        check_json(path, directory)
        tree = json.loads(path.read_text(encoding="utf-8"))
        clip = Clip.load(directory)
        normalisation = tree.get("preprocess_cfg", {})
        tokenizer = clip_tokenizer(int(clip.config["text_cfg"]["context_length"]))
        return Scorer(clip, tokenizer, (normalisation.get("mean", OURS[0]), normalisation.get("std", OURS[1])))


def scorer_of(directory: Path | None, model: Path | None) -> tuple[Scorer, str]:
    """A CLIP and the sha256 of its weights: from a folder in open_clip's format, or by default from the model's folder.

    The model's CLIP lacks words that the text encoder has learnt since. Raises ConfigError, ModelError, UnsafeError.
    """
    if directory is not None:
        return load_scorer(directory), sha256_of(directory / WEIGHTS)
    if model is None or not (model / "clip").is_dir():
        raise ConfigError("this model has no CLIP of its own. Name one in open_clip's format (load_clip, --clip)")
    return load_own_scorer(model), sha256_of(model / "clip" / WEIGHTS)
