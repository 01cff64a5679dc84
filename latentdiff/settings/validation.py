"""pydantic's errors in our words: the key, what its value must be, and the value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

_WORDS = {
    "Value error, ": "",
    "Input should be ": "must be ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
    "Tuple should have": "must have",
    "Field required": "is missing",
    "String should have at least 1 character": "must not be empty",
    "String should": "must",
    "match pattern '^[^/\\s]*$'": "hold no space and no slash",
}


class Fault(NamedTuple):
    """The first fault. The path to its key is empty if several keys contradict each other."""

    path: tuple[str, ...]
    message: str
    got: Any
    unknown: bool = False
    missing: bool = False

    @property
    def key(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


class Invalid(Protocol):
    """An error of pydantic's or FastAPI's."""

    def errors(self) -> Any:
        """The list of faults."""
        ...


def first_fault(error: Invalid) -> Fault:
    """The first fault of pydantic's list."""
    first = error.errors()[0]
    message = first["msg"]
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    path, kind = tuple(map(str, first["loc"])), first["type"]
    return Fault(path, message, first["input"], kind == "extra_forbidden", kind == "missing")


def did_you_mean(name: str, known: Iterable[str], others: Mapping[str, str] = MappingProxyType({})) -> str:
    """A suffix " (did you mean NAME?)" with the nearest known name, or ""; others: further spellings -> known names."""
    near = difflib.get_close_matches(name, [*known, *others], n=1)
    return f" (did you mean {others.get(near[0], near[0])}?)" if near else ""


def plain_name(value: str) -> str:
    """A name as the settings spell it: "SGM Uniform" is sgm_uniform."""
    return value.lower().replace(" ", "_")


def one_of(name: str, known: tuple[str, ...], value: str) -> str:
    """The known name that is meant, in its plain spelling. Raises ValueError if none is."""
    plain = plain_name(value)
    if plain not in known:
        raise ValueError(f"unknown {name} {value!r}; one of {', '.join(known)}")
    return plain
