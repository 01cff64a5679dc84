"""What was slow to find out, kept in a file of JSON lines: the rules it was found out by, then one value a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_memo(path: Path, rules: Any) -> list[Any]:
    """The values; none where there is no file, its rules are others, or a line is not as it was written."""
    if not path.is_file():
        return []
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        same = json.loads(first) == json.loads(json.dumps(rules))  # as JSON gives them back
        return [json.loads(line) for line in rest] if same else []
    except ValueError:
        return []


def write_memo(path: Path, rules: Any, values: Iterable[Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    partial.write_text("".join(json.dumps(value) + "\n" for value in (rules, *values)), encoding="utf-8")
    partial.replace(path)
