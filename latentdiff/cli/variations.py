"""`--vary NAME=VALUE,VALUE`: the same pictures under every combination of settings, and `--grid`, which shows them."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.cli.loading import common_settings
from latentdiff.cli.prompts import PromptEntry
from latentdiff.core.errors import ConfigError

Grid = Mapping[str, tuple[Any, ...]]
MOST = 1000  # combinations
_SHORT = {"cfg": "guidance_scale", "steps": "num_inference_steps"}


def grid_of(options: Sequence[str], option: str) -> dict[str, tuple[Any, ...]]:
    """The settings and their values of NAME=VALUE,VALUE, each name once. Raises ConfigError."""
    grid: dict[str, tuple[Any, ...]] = {}
    for text in options:
        name, equals, values = text.partition("=")
        name = _SHORT.get(name.strip(), name.strip())
        if not equals or not values or name in grid:
            raise ConfigError(f"{option} must be NAME=VALUE,VALUE, each name once (got {text[:60]!r})")
        choices = [_setting(name, value.strip()) for value in re.split(r",(?![^\[]*\])", values)]  # outside brackets
        grid[name] = tuple(choices)
    if (count := math.prod(map(len, grid.values()))) > MOST:
        raise ConfigError(f"{option} gives {count:,} combinations of settings. At most {MOST:,} are tried")
    return grid


def _setting(name: str, value: str) -> Any:
    return common_settings({}, [f"{name}={value}"])[name]


def varied(entries: Sequence[PromptEntry], grid: Grid, common: Mapping[str, Any]) -> list[PromptEntry]:
    """Each entry under every combination, with the same seeds. Raises ConfigError for a setting that is given too."""
    if not grid:
        return list(entries)
    from latentdiff.evaluation.sweep import combinations

    seed = common.get("seed")
    seed = secrets.randbelow(2**32) if seed is None else seed
    results: list[PromptEntry] = []
    for entry in entries:
        fixed = common.keys() | entry.settings.keys()
        if twice := [name for name in grid if name in fixed or name in ("num_images", "batch_size")]:
            raise ConfigError(f"--vary {twice[0]}: it is given elsewhere, or does not change pictures")
        first = {"seed": entry.settings.get("seed", seed)}
        results += [replace(entry, settings=entry.settings | first | chosen) for chosen in combinations(grid)]
        counts = {**first, "num_images": entry.settings.get("num_images", common["num_images"])}
        for name, value in counts.items():
            if type(value) is not int:
                raise ConfigError(f"{name} must be a whole number (got {str(value)[:40]!r})")
        seed = counts["seed"] + counts["num_images"]
    return results


def write_grid(paths: Sequence[Path], entries: Sequence[PromptEntry], grid: Grid, images: int, folder: Path) -> Path:
    """Write the labelled grid of all pictures of a command, `grid-NNNNN.png` in their folder.

    Columns are the last setting's values, or without one the seeds of a prompt's pictures; rows are everything else.
    """
    from latentdiff.core.files import write_new
    from latentdiff.drawing.files import encoded, next_number, open_picture
    from latentdiff.drawing.sheet import grid as grid_of

    others, last = list(grid)[:-1], list(grid)[-1] if grid else None
    across = images if last is None else len(grid[last])
    prompts = len({entry.where for entry in entries}) > 1
    seeds = [f"seed {path.stem.rpartition('-')[2]}" for path in paths]
    columns = [""] * across if prompts else seeds[:across]
    if last is not None:
        columns = [f"{last} {value}" for value in grid[last]]
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for number, path in enumerate(paths):
        entry = entries[number // images]
        key = (entry.where, entry.prompt if prompts else "", *(f"{name} {entry.settings[name]}" for name in others))
        if last is not None:
            key = (*key, seeds[number] if images > 1 else "")
        rows.setdefault(key, []).append(open_picture(path))
    names = [", ".join(str(part) for part in key[1:] if part) for key in rows]
    number = next_number(folder, r"grid-(\d{5})\.png")
    path = folder / f"grid-{number:05d}.png"
    write_new(path, encoded(grid_of(list(rows.values()), columns, names), ".png", None))
    return path
