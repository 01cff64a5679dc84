"""The ownership of a report's folder: written by us, for one set of settings, and outside the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError

SETTINGS = "settings.json"
NAMES = ("models", "data")  # names and paths may differ for the same content, which its sha256 identifies


def check(report: Path, data: str | None) -> None:
    """Raises ConfigError, before any work, for a folder that is not ours or lies among the data."""
    from latentdiff.core.files import SCRATCH, check_writable
    from latentdiff.training import lock

    if report.is_file():
        raise ConfigError(f"{report} is a file. Name a folder for the report")
    if data and Path(data).is_dir() and report.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"{report} lies inside the data and would add pictures to it. Name a folder outside")
    check_writable(report, report)
    ours = {lock.NAME} | {path.name for path in report.glob(f"{SCRATCH}*")}  # of a killed one; writing removes it
    has_others = report.is_dir() and any(path.name not in ours for path in report.iterdir())
    if has_others and not (report / SETTINGS).is_file():
        raise ConfigError(f"{report} has other files, and nothing is written beside them. Name another folder")


def claim(report: Path, rules: dict[str, Any]) -> None:
    """Write the settings of a report into its folder. Raises ConfigError if it has a report of other settings."""
    from latentdiff.core.files import write_json

    path = report / SETTINGS
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise ConfigError(f"{path} is damaged. Name another folder for the report") from None
        old, new = (_flat(nameless(each)) for each in (before, rules))
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if changed:
            changes = "; ".join(f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed[:3])
            raise ConfigError(f"{path.parent} is the report of other settings ({changes}). Name another folder")
    write_json(path, rules)


def nameless(rules: dict[str, Any]) -> dict[str, Any]:
    """The settings without names and paths."""
    return {key: value for key, value in rules.items() if key not in NAMES}


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The entries of a nested tree, by joined names."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree, 1) if isinstance(tree, list) else ()
    inside = [_flat(value, f"{name} {key}".strip()) for key, value in pairs]
    return {key: value for each in inside for key, value in each.items()} if inside else {name: tree}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
