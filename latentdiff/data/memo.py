"""Slow results in a file of JSON lines: first the rules that they depend on, then one value a line.

The first line also has a sha256 of the others, so that results in a damaged or edited file are computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentdiff.core.files import write_text


def read_memo(path: Path, rules: Any) -> list[Any]:
    """The values; an empty list if there is no file, its rules differ, or a line was changed."""
    if not path.is_file():
        return []
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        if json.loads(first) == json.loads(json.dumps(_header(rules, rest))):  # after a round trip through JSON
            return [json.loads(line) for line in rest.splitlines()]
        return []
    except (ValueError, OSError, RecursionError):
        return []


def write_memo(path: Path, rules: Any, values: Iterable[Any]) -> None:
    """Write the values, whole or not at all."""
    rest = "".join(json.dumps(value) + "\n" for value in values)
    write_text(path, f"{json.dumps(_header(rules, rest))}\n{rest}")


def _header(rules: Any, rest: str) -> list[Any]:
    return [rules, hashlib.sha256(rest.encode()).hexdigest()]
