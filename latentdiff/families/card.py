"""The facts about a model that diffusers' layout does not contain.

latentdiff.json   its name, size and recommended settings
words.txt         the words of the captions that it was trained on, one a line; models from elsewhere have none.
                  A word that stands in captions of one thing alone is followed by a tab and the thing's name
things.json       the names of what it draws, by category, for models of named things
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel

from latentdiff.core.errors import ModelError, loading
from latentdiff.families.scheduler import read_json_as, read_scheduler
from latentdiff.formats.folder import folder_hash, picture_geometry, read_json
from latentdiff.model import EMPTY, ModelCard
from latentdiff.settings.recommended import Recommended

FILE = "latentdiff.json"
WORDS, THINGS = "words.txt", "things.json"
Side = Annotated[int, Field(ge=8, le=2048)]


class _Card(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    size: tuple[Side, Side]
    defaults: Recommended | None
    weights: str | None = None  # sha256 of all weights that were saved together


class _Things(RootModel[dict[str, tuple[str, ...]]]):
    """Names by category."""


def model_card(
    directory: Path,
    T: int,
    variant: str | None = None,
    defaults: Mapping[str, Any] = EMPTY,
    *,
    hashed: bool = True,
) -> ModelCard:
    """The card of a checked folder. Without latentdiff.json the settings are the scheduler's and the family's defaults.

    T: the model's number of times. hashed: whether all weights are the folder's, so that its hash is theirs.
    Raises ModelError.
    """
    multiple, side = picture_geometry(directory)
    path, sha256 = directory / FILE, folder_hash(directory, variant) if hashed else ""
    if not path.is_file():
        scheduler = read_scheduler(directory)
        usual = {**scheduler.recommended, **defaults}
        return ModelCard(directory.resolve().name, sha256, side, usual, folder=directory, notes=scheduler.notes)
    card = read_json_as(_Card, path)
    if hashed and variant is None and card.weights not in (None, sha256):
        raise ModelError(
            f"the weights were not saved together ({directory}): one part belongs to another model or training. "
            f'If you have replaced it on purpose, remove "weights" from {FILE}'
        )
    if any(length % multiple for length in card.size):
        raise ModelError(f"size must be multiples of {multiple} (got {card.size} in {path})")
    defaults = card.defaults.model_dump(exclude_unset=True) if card.defaults else {}
    if defaults.get("num_inference_steps", 1) > T:
        raise ModelError(f"{defaults['num_inference_steps']} recommended steps are more than {T} times ({path})")
    listed, things = known_words(directory), known_things(directory)
    words = None if listed is None else frozenset(listed)
    of_one_thing = {word: name for word, name in (listed or {}).items() if name}
    own = ModelCard(card.name, sha256, card.size, defaults, folder=directory)
    return replace(own, words=words, of_one_thing=of_one_thing, things=things)


def known_name(directory: Path) -> str:
    """The name in a model's latentdiff.json, or the folder's."""
    path = directory / FILE
    return read_json_as(_Card, path).name if path.is_file() else directory.resolve().name


def known_words(directory: Path) -> dict[str, str] | None:
    """The words that a model was trained on, each with the only thing whose captions have it, or "".

    None if its folder does not say. Raises ModelError.
    """
    path = directory / WORDS
    if not path.is_file():
        return None
    with loading(WORDS, directory):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = [line.partition("\t") for line in lines]
    return {word: name.strip() for words, _, name in rows for word in words.lower().split()}


def words_text(card: ModelCard) -> str:
    """The content of words.txt for a card that has words."""
    assert card.words is not None
    names = {word: f"\t{name}" for word, name in card.of_one_thing.items()}
    return "".join(f"{word}{names.get(word, '')}\n" for word in sorted(card.words))


def known_things(directory: Path) -> dict[str, tuple[str, ...]] | None:
    """The names of what a model draws, by category, or None if its folder does not say. Raises ModelError."""
    path = directory / THINGS
    if path.is_file():
        return read_json_as(_Things, path).root
    labels = read_json(directory / "model_index.json").get("id2label")
    names = tuple(map(str, labels.values())) if isinstance(labels, dict) else ()
    return {"classes": names} if names else None


def card_tree(card: ModelCard) -> dict[str, Any]:
    """The content of latentdiff.json for a card."""
    defaults = {name: value for name, value in card.defaults.items() if name in Recommended.model_fields}
    return {"name": card.name, "size": list(card.size), "defaults": defaults or None}
