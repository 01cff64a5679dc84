"""A self-contained HTML page: sections of text, figures, and pictures with captions."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from latentdiff.core.images import as_picture

PAGE = '<!doctype html><meta charset="utf-8"><meta name="generator" content="latentdiff">'  # the beginning of each page

SCREEN = '<meta name="viewport" content="width=device-width">'


@dataclass(frozen=True)
class Entry:
    """A heading, a summary in one line, and a list of lines."""

    title: str
    text: str
    lines: tuple[str, ...] = ()


STYLE = (
    "body{font:15px system-ui;margin:2em}th,td{text-align:left;vertical-align:top;padding:0 1.5em 0 0}"
    "ul{margin:0;color:#555;list-style:none;padding:0}main{display:flex;flex-wrap:wrap;gap:12px;margin:1em 0}"
    "figure{margin:0;width:160px;overflow-wrap:anywhere}img{max-width:160px;outline:1px solid #ddd}b{color:#777}"
    ".strip,.strip img:not(.small){width:320px;max-width:100%}.small{image-rendering:pixelated}"
    "figcaption{font-size:12px;max-height:12em;overflow:auto}"
    ".plot,.plot img{width:540px;max-width:100%}.number{text-align:right;white-space:nowrap}"
    ".note{color:#777;font-size:12px;max-width:32em}.wide{overflow-x:auto}.wide td{padding-bottom:3px}"
    "nav{margin:1em 0}nav a{margin-right:1em}@media(max-width:600px){body{margin:1em}}"
)


def as_html(
    title: str, entries: Sequence[Entry], sheet: Sequence[tuple[np.ndarray, Mapping[str, str]]], figures: str = ""
) -> str:
    """A page of sections, figures in HTML, then pictures uint8 (H, W, C) with captions."""
    return document(title, listed(entries), gallery(sheet, figures))


def document(title: str, *parts: str) -> str:
    """A page of parts in HTML."""
    head = f"{PAGE}{SCREEN}<title>{escaped(title)}</title><style>{STYLE}</style>"
    return f"{head}<h1>{escaped(title)}</h1>{''.join(parts)}\n"


def listed(entries: Sequence[Entry]) -> str:
    """Sections as the rows of a table."""
    rows = []
    for section in entries:
        lines = "".join(f"<li>{escaped(line)}</li>" for line in section.lines)
        rows.append(f"<tr><th>{escaped(section.title)}</th><td>{escaped(section.text)}<ul>{lines}</ul></td></tr>")
    return f"<table>{''.join(rows)}</table>"


def heading(title: str) -> str:
    """The heading of a chapter, to which `contents` links."""
    return f'<h2 id="{escaped(title)}">{escaped(title)}</h2>'


def contents(titles: Sequence[str]) -> str:
    """Links to the headings of a page."""
    links = (f'<a href="#{quote(title)}">{escaped(title)}</a>' for title in titles)
    return f"<nav>{' '.join(links)}</nav>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table of text; all columns but the first are set as numbers. notes: a line under each row's first cell."""

    def cells(kind: str, row: Sequence[str], under: str = "") -> str:
        first, *others = map(escaped, row)
        note = f'<div class="note">{escaped(under)}</div>' if under else ""
        return f"<tr><{kind}>{first}{note}" + "".join(f'<{kind} class="number">{other}' for other in others)

    lines = [cells("td", row, under) for row, under in zip(rows, notes or [""] * len(rows), strict=True)]
    return f'<div class="wide"><table>{cells("th", head)}{"".join(lines)}</table></div>'


def gallery(sheet: Sequence[tuple[np.ndarray, Mapping[str, str]]], figures: str = "") -> str:
    """Figures in HTML, then pictures uint8 (H, W, C) with captions, side by side."""
    return f"<main>{figures}{''.join(_figure(pixels, caption) for pixels, caption in sheet)}</main>"


def _figure(pixels: np.ndarray, caption: Mapping[str, str]) -> str:
    buffer = io.BytesIO()
    as_picture(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    lines = "".join(f"<div><b>{escaped(key)}</b> {escaped(value)}</div>" for key, value in caption.items())
    strip = pixels.shape[1] > 2 * pixels.shape[0]
    kind, times = ' class="strip"' if strip else "", (320 if strip else 160) // pixels.shape[1]
    size = f' class="small" width="{times * pixels.shape[1]}"' if times > 1 else ""  # small ones enlarged by pixels
    return f'<figure{kind}><img{size} src="data:image/png;base64,{data}"><figcaption>{lines}</figcaption></figure>'


def escaped(text: str) -> str:
    """Text escaped for HTML; lone surrogates are written as escapes."""
    return html.escape(text.encode("utf-8", "backslashreplace").decode())
