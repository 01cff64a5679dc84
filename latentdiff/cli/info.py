"""`latentdiff info`: a description of a model, an adapter or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.core.errors import ConfigError


def info(
    path: Annotated[Path, typer.Argument(help="A model folder, a .safetensors file or a picture.")],
    find: Annotated[
        str | None, typer.Option(help="Print the model's things whose names contain this text; '' for all.")
    ] = None,
) -> None:
    """Describe a model, an adapter or a picture as JSON.

    The parts and sizes of a model, the kind of an adapter, the record in a picture of how it was made.
    """
    import json

    if not path.exists():
        from latentdiff.families.loading import place_of

        path = place_of(path)
    if path.is_dir() and not (path / "model_index.json").is_file():
        path = _adapter_in(path)
    weights = path.suffix.lower() in (".safetensors", ".gguf", ".ckpt", ".pt", ".bin")
    if not path.exists():
        raise ConfigError(f"no such file or folder ({path})")
    if find is not None:
        _print_things(path, find)
        return
    facts = _of_model(path) if path.is_dir() else _of_weights(path) if weights else _of_picture(path)
    terminal.result(*json.dumps(facts, indent=1, ensure_ascii=False).split("\n"))


def _print_things(path: Path, text: str) -> None:
    """A line for each category with the names that contain the text. Raises ConfigError if the model lists none."""
    from latentdiff.families.card import known_things

    things = known_things(path) if path.is_dir() else None
    if things is None:
        raise ConfigError(f"{path} has no things.json, so what it draws is not known")
    matching = {
        category: [name for name in names if text.lower() in name.lower()] for category, names in things.items()
    }
    if not any(matching.values()):
        terminal.note(f"it draws nothing whose name contains {text!r}")
    terminal.result(*(f"{category}: {', '.join(names)}" for category, names in matching.items() if names))


def _adapter_in(folder: Path) -> Path:
    """The adapter or the learnt words in the folder of a fine-tuning; the folder itself if there are none."""
    from latentdiff.families.image_prompts import FILE
    from latentdiff.formats import adapter_file, words_file

    files = [folder / name for name in (*adapter_file.NAMES, words_file.FILE, FILE)]
    return next((file for file in files if file.is_file()), folder)


def _of_model(path: Path) -> dict[str, object]:
    """A model's description, from its JSON and the headers of its weights; no network is built."""
    from latentdiff.families import check_folder
    from latentdiff.families.card import known_name, known_things, known_words
    from latentdiff.families.scheduler import read_scheduler
    from latentdiff.formats.folder import folder_hash, parameter_counts, quantized_parts

    _, index = check_folder(path)
    schedule, prediction, *_ = read_scheduler(path)
    counts, words, things = parameter_counts(path), known_words(path), known_things(path)
    return {
        "name": known_name(path),
        "class": index.get("_class_name"),
        "hash": folder_hash(path),
        "parameters": counts | {"total": sum(counts.values())},
        **({"quantized": kinds} if (kinds := quantized_parts(path)) else {}),
        "prediction": prediction,
        "timesteps": schedule.T,
        "terminal_snr": schedule.numbered(schedule.T - 1).snr,
        **({} if words is None else {"words": len(words)}),
        **({} if things is None else {"things": {category: len(names) for category, names in things.items()}}),
    }


def _of_weights(path: Path) -> dict[str, object]:
    """A single file's description, from the names of its tensors."""
    from latentdiff.families.single_file import described

    return described(path)


def _of_picture(path: Path) -> dict[str, object]:
    from latentdiff.core.errors import DataError
    from latentdiff.drawing.record import read_metadata

    metadata = read_metadata(path)
    if not metadata:
        raise DataError(f"this picture has no record of how it was made ({path})")
    return _without_nulls(metadata)


def _without_nulls(tree: Any) -> Any:
    """A JSON tree without empty values."""
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value not in (None, [], {})}
    return tree
