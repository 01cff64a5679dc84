"""Text from outside, made safe to print."""

from __future__ import annotations

import re
import unicodedata

_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls, bidi and other formats, lone surrogates, line ends
_BREAK = re.compile(r"[^\S ]*[\n\r\v\f\x85\u2028\u2029]\s*")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_JOINERS = "\u200c\u200d"  # in Persian words and between emoji


def printable(text: object) -> str:
    r"""The text on one line, with every character that a terminal would obey or hide as an escape of JSON.

    A name may hold ESC, a carriage return, a new line or a change of direction, and so forge what a person reads.
    `"a\x1b[2J"` becomes `a\u001b[2J`. JSON without raw controls stays the same JSON.
    """
    return "".join(_escaped(c) if _is_hidden(c) else c for c in str(text))


def _is_hidden(character: str) -> bool:
    return not character.isprintable() and unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def _escaped(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def one_line(text: object) -> str:
    """A text of any number of lines on one line, printable."""
    return printable(_BREAK.sub(" ", str(text).strip("\r\n")).rstrip())


def quoted(text: object) -> str:
    """Somebody else's text for Markdown: in a code span if it has markup characters. Backticks become apostrophes."""
    plain = one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if re.search(r"[<>&*_\[\]()#!\\|~]", plain) else plain
