"""The prompts of a command: one, or a file of them, each with its own settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError

_PATHS = ("image", "mask")


@dataclass(frozen=True)
class PromptEntry:
    """A prompt with its own settings, and the paths of an image and a mask; `where` names it in errors."""

    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)
    image: Path | None = None
    mask: Path | None = None
    outpaint: tuple[int, ...] | None = None
    where: str = ""


def one_prompt(prompt: str) -> str:
    """The prompt, or the text of standard input for "-". Raises ConfigError."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise ConfigError("prompt: standard input is not text in UTF-8") from None


def read_prompts(path: Path) -> list[PromptEntry]:
    """A line a prompt, or a JSON object a line in a .jsonl file: prompt, any setting, image, mask, outpaint.

    Lines that begin with # are comments, except in a .jsonl file.

    Paths are relative to the file; null is the same as a missing entry. Raises ConfigError, which names the line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read prompts ({path}): {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts are not text in UTF-8, byte {error.start} ({path})") from None
    read = _of_json if path.suffix.lower() == ".jsonl" else _of_text
    entries = list(read(text, path))
    if not entries:
        raise ConfigError(f"the file has no prompts ({path})")
    return entries


def _of_text(text: str, path: Path) -> Iterator[PromptEntry]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield PromptEntry(line.strip(), where=f"{path} line {number}")


def _of_json(text: str, path: Path) -> Iterator[PromptEntry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            tree = json.loads(line, object_pairs_hook=_without_nulls)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"{where} is not JSON") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), str):
            raise ConfigError(f'{where} must be an object with a "prompt"')
        yield _entry(tree, path.parent, where)


def _without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without its null entries. Raises ConfigError for a name that occurs twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice")
    return {name: value for name, value in pairs if value is not None}


def _entry(tree: dict[str, Any], folder: Path, where: str) -> PromptEntry:
    from latentdiff.drawing.inputs import margins_of

    prompt = tree.pop("prompt")
    if "mask" in tree and "mask_image" in tree:
        raise ConfigError(f"{where}: mask is given twice")
    if "mask_image" in tree:  # as in Python
        tree["mask"] = tree.pop("mask_image")
    paths = {name: tree.pop(name, None) for name in _PATHS}
    outpaint = tree.pop("outpaint", None)
    if not all(value is None or isinstance(value, str) for value in paths.values()):
        raise ConfigError(f"{where}: image and mask are paths")
    try:
        margins_of(outpaint)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    full = {name: None if value is None else folder / value for name, value in paths.items()}
    return PromptEntry(prompt, tree, full["image"], full["mask"], None if outpaint is None else tuple(outpaint), where)
