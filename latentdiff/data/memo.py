"""What was slow to find out, kept in a file of JSON lines: the rules it was found out by, then one value a line.

The first line also holds a sha256 of the others, so that what was damaged or edited is found out again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentdiff.core.files import write_text


def read_memo(path: Path, rules: Any) -> list[Any]:
    """The values; none where there is no file, its rules are others, or a line is not as it was written."""
    if not path.is_file():
        return []
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        if json.loads(first) == json.loads(json.dumps(_header(rules, rest))):  # as JSON gives it back
            return [json.loads(line) for line in rest.splitlines()]
        return []
    except (ValueError, OSError, RecursionError):
        return []


def write_memo(path: Path, rules: Any, values: Iterable[Any]) -> None:
    """Whole or not at all."""
    rest = "".join(json.dumps(value) + "\n" for value in values)
    write_text(path, f"{json.dumps(_header(rules, rest))}\n{rest}")


def _header(rules: Any, rest: str) -> list[Any]:
    return [rules, hashlib.sha256(rest.encode()).hexdigest()]
