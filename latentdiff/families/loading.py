"""Models read by path, single file or hub id, and written to folders."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from latentdiff.core.errors import ConfigError, ModelError, saving
from latentdiff.core.files import atomic, recorded, write_json, write_text
from latentdiff.core.turn import LOADING
from latentdiff.families import check_folder
from latentdiff.families.card import FILE as CARD_FILE
from latentdiff.families.card import THINGS, WORDS, card_tree, model_card, words_text
from latentdiff.families.scheduler import FILE as SCHEDULER_FILE
from latentdiff.families.scheduler import scheduler_config
from latentdiff.formats.folder import FEW_STEPS, NETWORKS, folder_hash
from latentdiff.model import Family, Model, ModelCard

DEFAULT_MODEL = "scenes-64"
INCLUDED = (DEFAULT_MODEL, "emoji-128")  # the models inside the package
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_PARTS = frozenset({*NETWORKS, *_TOKENIZERS, WORDS, THINGS, FEW_STEPS})  # those of an earlier model are removed


class Located(NamedTuple):
    """A model on this disk: its file or folder, its name, and its path, hub id or name (None: the default model)."""

    path: Path
    name: str
    source: str | None


def included_model(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a model inside the package, or in `assets/` of a source checkout."""
    package = Path(str(files("latentdiff")))
    for folder in (package / "assets" / name, package.parent / "assets" / name):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelError(f"the model {name} is not in this installation ({package}). Name a model folder")


def located(path: str | Path | None, variant: str | None = None, revision: str | None = None) -> Located:
    """The model at a path, of a hub id, or inside the package; None is the default. Raises ModelError.

    What a hub id names is fetched unless it is in the cache.
    """
    from latentdiff.formats.hub import fetched, is_hub_id

    included = name_of_included(path)
    if revision is not None and (included is not None or not is_hub_id(str(path))):
        what = f"a path ({path})" if included is None else f"the model {included} of this package"
        raise ConfigError(f"revision applies to hub ids, not to {what}")
    if included is not None:
        return Located(included_model(included), included, None if included == DEFAULT_MODEL else included)
    if not isinstance(path, str | Path) or not _possible(Path(path)):
        raise ModelError(f"no such model ({str(path)[:80]!r}). Give a folder, a file or a hub id")
    if is_hub_id(str(path)):
        folder = fetched(str(path), revision, variant)
        return Located(folder, str(path), f"{path}@{folder.name}")  # a snapshot is named after its commit
    place = Path(path)
    name = place.stem if place.is_file() else place.resolve().name
    return Located(place, name, recorded(place))


def name_of_included(path: str | Path | None) -> str | None:
    """The name of a model inside the package, unless a file or folder has that name; the default one's for None."""
    if path is None:
        return DEFAULT_MODEL
    return str(path) if str(path) in INCLUDED and not Path(path).exists() else None


def place_of(path: str | Path | None) -> Path:
    """The path of a model on this disk; None and the name of a model inside the package give its folder."""
    included = name_of_included(path)
    return Path(path or "") if included is None else included_model(included)


def _possible(path: Path) -> bool:
    """Whether a path can exist: its names are not too long and have no NUL."""
    try:
        path.exists()
    except (OSError, ValueError):
        return False
    return True


def stored_model(path: str | Path | None, variant: str | None = None, revision: str | None = None) -> Model:
    """A torch model on the CPU in its stored precision. Raises ModelError, UnsafeError."""
    source = located(path, variant, revision)
    if source.path.is_file():
        if variant is not None:
            raise ModelError(f"a single file has no variants (got {variant!r} for {source.path})")
        from latentdiff.families.single_file import load_single_file

        with LOADING:
            model = load_single_file(source.path)
    else:
        family, _ = check_folder(source.path)
        with LOADING:
            model = family.load(source.path, variant)
    return replace(model, card=_named(model.card, source, variant))


def card_of(source: Located, family: Family, T: int, variant: str | None) -> ModelCard:
    """The card of a checked folder, with the name and the source of `located`."""
    return _named(model_card(source.path, T, variant, family.defaults(source.path)), source, variant)


def _named(card: ModelCard, source: Located, variant: str | None) -> ModelCard:
    name = source.name if card.name == source.path.resolve().name else card.name
    return replace(card, name=name, source=source.source, variant=variant)


def save_model(model: Model, directory: Path, *, with_student: bool = False) -> None:
    """Write a folder: networks, tokenizer, scheduler, model_index, latentdiff.json, and its CLIP if it has one.

    with_student: also its few-step student, if it has one; the student fits only these weights.

    Raises ConfigError for a model without a family and for a path that is a file.
    """
    if model.quantized in ("int8", "fp8"):
        raise ConfigError(f"{model.quantized} cannot be saved; q8_0 and q4_0 can")
    if model.family is None:
        raise ConfigError("saving requires a model that belongs to a family, which defines the layout")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; a model is a folder")
    made_here = model.card.folder is None and model.card.source is None  # by a run, which has put its CLIP there
    with saving("the model", directory.parent), atomic(directory, _PARTS | (set() if made_here else {"clip"})) as made:
        clip = None if model.card.folder is None else model.card.folder / "clip"
        if clip is not None and clip.is_dir():
            shutil.copytree(clip, made / "clip")
        student = None if model.card.folder is None else model.card.folder / FEW_STEPS
        if with_student and student is not None and student.is_dir():
            shutil.copytree(student, made / FEW_STEPS)
        model.family.save(model, made)
        sampler, spacing = (model.card.defaults.get(name, "") for name in ("sampler", "spacing"))
        unet = "unet" in model.parts
        scheduler = scheduler_config(model.path, model.prediction, spacing or "trailing", sampler, unet=unet)
        write_json(made / SCHEDULER_FILE, scheduler)
        index = model.family.index(model) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        write_json(made / "model_index.json", index)
        if model.card.words is not None:
            write_text(made / WORDS, words_text(model.card))
        if model.card.things is not None:
            write_json(made / THINGS, model.card.things)
        write_json(made / CARD_FILE, card_tree(model.card) | {"weights": folder_hash(made)})
