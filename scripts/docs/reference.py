"""Pages of the reference that are made from the code when the manual is built (a hook of mkdocs).

reference/command-line.md    every command and option, by typer
reference/settings.md        every key of the configs and every setting of drawing, with its default and meaning
reference/errors.md          every kind of error and its exit code
"""

from __future__ import annotations

import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentdiff.core import errors
from latentdiff.drawing.request import Request
from latentdiff.settings.config import Config
from latentdiff.settings.finetuning import FineTuning

_OTHER_CODES = {
    0: "Success.",
    1: "`reproduce`: the picture that was drawn again differs.",
    130: "Interrupted by Ctrl-C. A training run has saved its state.",
    141: "The program that reads the output has closed it.",
    143: "Terminated by SIGTERM. A training run has saved its state.",
}
_BOUNDS = {Ge: ("ge", "from"), Gt: ("gt", "over"), Le: ("le", "to"), Lt: ("lt", "under")}  # attribute, word


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; mkdocs calls this."""
    for name, content in (("command-line", commands()), ("settings", settings()), ("errors", error_codes())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def commands() -> str:
    """Every command with its options."""
    words = [sys.executable, "-m", "typer", "latentdiff.cli", "utils", "docs", "--name", "latentdiff"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return text.replace("# `latentdiff`", "# Command line", 1)


def settings() -> str:
    """Tables of all settings."""
    parts = [
        "# Settings\n",
        "`--set NAME=VALUE` sets any of these. Values are TOML: `true`, `0.5`, `[64, 64]`, or a bare word.\n",
        "## Drawing\n\nSettings of `latentdiff generate --set`, and arguments of the Python object.\n",
        _table(list(keys(Request))),
        "## Training from nothing\n\nKeys of the config of `latentdiff train`.\n",
        *_by_section(Config),
        "## Fine-tuning\n\nKeys of `latentdiff finetune --set`, or of its `--config`. Sections `data.*` are as above. "
        "The default of a learning rate and of the number of steps depends on the method.\n",
        *_by_section(FineTuning, without=("data",)),
    ]
    return "\n".join(parts)


def _by_section(kind: type[BaseModel], without: tuple[str, ...] = ()) -> Iterator[str]:
    """A heading and a table for each section of a config; sections of one class are described once."""
    seen: dict[type[BaseModel], str] = {}
    for prefix, section in sections(kind):
        if prefix.partition(".")[0] in without:
            continue
        title = f"### `{prefix.rstrip('.')}`\n" if prefix else "### At the top\n"
        text = " ".join((section.__doc__ or "").split("\n\n")[0].split()) if prefix else ""
        if section in seen:
            yield f"{title}\nThe same keys as [`{seen[section]}`](#{seen[section].replace('.', '')}).\n"
            continue
        seen[section] = prefix.rstrip(".")
        plain = [(name, field) for name, field in section.model_fields.items() if not _is_section(field)]
        yield f"{title}\n{text}\n\n{_table([(prefix + name, field) for name, field in plain])}"


def sections(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a config with the prefix of its keys, `denoiser.training.`."""
    yield prefix, kind
    for name, field in kind.model_fields.items():
        if _is_section(field):
            assert isinstance(field.annotation, type)
            yield from sections(field.annotation, f"{prefix}{name}.")


def keys(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field."""
    for before, section in sections(kind, prefix):
        yield from ((before + name, field) for name, field in section.model_fields.items() if not _is_section(field))


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(rows: list[tuple[str, FieldInfo]]) -> str:
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in rows:
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {_default(field)} | {_values(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "random"
    if field.default is None or field.default == "":
        return "none"
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _values(field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    named = [(each, *_BOUNDS[type(each)]) for each in field.metadata if type(each) in _BOUNDS]
    bounds = [f"{word} {_number(getattr(bound, attribute))}" for bound, attribute, word in named]
    return f"{kind} {' '.join(bounds)}".strip()


def _number(value: float) -> str:
    """A bound as people write it; the largest seeds as powers."""
    if value == 2**64 - 1 or value == 2**63:
        return "2^64 - 1" if value > 2**63 else "2^63"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is typing.Annotated:
        return _values(FieldInfo.from_annotation(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(each) for each in get_args(annotation) if each is not type(None))
    if origin is tuple:
        inner = get_args(annotation)
        return (
            f"list of {_plural(_kind(inner[0]))}"
            if inner[-1] is Ellipsis
            else f"list of {len(inner)} {_plural(_kind(inner[0]))}"
        )
    if annotation is dict or origin is dict:
        return "table"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}.get(annotation, "")


def _plural(kind: str) -> str:
    known = {"text": "texts", "`true`, `false`": "`true` or `false`"}
    return known.get(kind, re.sub(r"\b(number|table)\b", r"\1s", kind))


def error_codes() -> str:
    """The table of exit codes, and the classes in Python."""
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LatentDiffError)
    ]
    rows = {
        kind.exit_code: (f"`{kind.__name__}`", kind.__doc__ or "")
        for kind in kinds
        if kind is not errors.LatentDiffError
    }
    rows |= {code: ("", text) for code, text in _OTHER_CODES.items()}
    table = "\n".join(f"| {code} | {name} | {' '.join(text.split())} |" for code, (name, text) in sorted(rows.items()))
    return f"""# Errors

An error is one line on standard error that begins with `error:`, and an exit code. It says what is wrong, where, and
what to do. In Python the same line is the message of an exception. All of them are subclasses of
`latentdiff.core.errors.LatentDiffError`. Any other error, with a traceback, is a bug in latentdiff.

| exit code | exception | meaning |
|---|---|---|
{table}

Warnings begin with `warning:`. The command goes on after a warning, and its result is right. The line says what
you should know about it.
"""
