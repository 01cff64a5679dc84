"""The emoji data set: pictures of four open icon sets, drawn from their vectors, with names and keywords.

    npm install @iconify-json/{noto,fluent-emoji,fluent-emoji-flat,twemoji} emojibase-data
    pip install resvg-py
    python scripts/emoji.py node_modules emoji   # emoji/sprites: RGBA pictures and metadata.jsonl

scripts/compose.py composes pictures of them. Licences: noto Apache-2.0 (Google), fluent-emoji and fluent-emoji-flat MIT
(Microsoft), twemoji CC-BY-4.0 (Twitter and contributors), emojibase-data MIT. Models of these pictures must name them.
Left out are icons that differ from another one by skin tone or gender only, and those that nobody asks for by name:
flags of countries, families by their members, buttons, arrows, letters, digits, clock faces, signs of the zodiac. They
are a quarter of all, and a small model that learns them knows the others less well.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.data.sprites.color import main_color

SETS = {"noto": "noto", "fluent-emoji": "glossy", "fluent-emoji-flat": "flat", "twemoji": "twemoji"}  # set -> style
_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")


def icons(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Every icon of a set that is not a skin tone of another: its name, its SVG and its code points."""
    tree = json.loads((folder / "@iconify-json" / name / "icons.json").read_text())
    coded = "fluent-emoji-flat" if name == "fluent-emoji" else name  # both have the same names
    chars = json.loads((folder / "@iconify-json" / coded / "chars.json").read_text())
    code = {icon: chars_code for chars_code, icon in chars.items()}
    for icon, entry in tree["icons"].items():
        if entry.get("hidden") or is_tone(icon, tree["icons"]):
            continue
        side = {axis: entry.get(axis, tree.get(axis, 16)) for axis in ("width", "height")}
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {side['width']} {side['height']}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        yield {"icon": icon, "svg": f"{svg}{entry['body']}</svg>", "code": code.get(icon, "")}


def is_tone(icon: str, names: Container[str]) -> bool:
    """Whether an icon is another one in a skin tone: artist-dark beside artist, but not police-car-light."""
    return "skin-tone" in icon or (_TONE.search(icon) is not None and _TONE.sub("", icon) in names)


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """Label, keywords and category of every emoji by its code points without variation selectors."""
    data = json.loads((folder / "emojibase-data" / "en" / "data.json").read_text())
    groups = json.loads((folder / "emojibase-data" / "meta" / "groups.json").read_text())
    result = {}
    for entry in data:
        result[plain(entry["hexcode"])] = {
            "name": entry["label"],
            "keywords": entry.get("tags", []),
            "category": groups["groups"].get(str(entry.get("group")), "symbols"),
            "subcategory": groups["subgroups"].get(str(entry.get("subgroup")), "other-symbol"),
        }
    return result


def labelled(item: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An icon's label, keywords and category; an unknown one is called by its file's name."""
    unknown = {"name": item["icon"].replace("-", " "), "keywords": [], "category": "other", "subcategory": ""}
    return known.get(plain(item["code"]), unknown)


def plain(code: str) -> str:
    """Code points in lower case, without variation selectors and leading zeros."""
    return "-".join(point.lower().lstrip("0") for point in code.split("-") if point.lower() != "fe0f")


def rendered(size: int, item: dict[str, Any]) -> bytes:
    """The icon as an RGBA PNG of size x size."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=item["svg"], width=size, height=size))


# how often a thing is drawn: people ask for animals and food first, seldom for a face or a sign, or for a long name
_WEIGHTS = {"animals-nature": 2.0, "food-drink": 2.0, "smileys-emotion": 0.2, "people-body": 0.2, "symbols": 0.2}
_WEIGHT_OF_LONG_NAMES = 0.2  # of three words or more
_UNASKED = {  # subcategories
    "country-flag",
    "subdivision-flag",
    "alphanum",
    "arrow",
    "av-symbol",
    "geometric",
    "transport-sign",
    "zodiac",
}
_UNASKED_NAMES = re.compile(r"^regional indicator|o’clock$|-thirty$|facing right$|^family|^keycap|^(couple|kiss) .*man")
_NEUTRAL = {"man": "person", "woman": "person", "men": "people", "women": "people"}
# subcategories, or their first words, of things that can be counted and stand beside others
_THINGS = {
    "animal",
    "cat-face",
    "monkey-face",
    "plant",
    "food",
    "drink",
    "dishware",
    "clothing",
    "tool",
    "household",
    "office",
    "book-paper",
    "musical-instrument",
    "light-video",
    "computer",
    "phone",
    "transport-ground",
    "transport-air",
    "transport-water",
    "mail",
    "writing",
    "medical",
    "science",
    "game",
    "money",
    "lock",
    "other-object",
    "arts-crafts",
    "place-building",
}
_BODIES = ("smileys-emotion", "people-body")  # their colour is that of all faces


RENAMED = {"ring": "diamond ring", "automobile": "car", "person: bald": "bald person"}  # "ring" is a shape


def spoken(name: str) -> str:
    """A label as people say it: "flag: France" is "flag of France", "person: beard" is "person with beard"."""
    name = RENAMED.get(name, name)
    before, colon, after = name.partition(": ")
    link = {"flag": " of ", "keycap": " ", "family": " of "}.get(before, " with ")
    return f"{before}{link}{after}" if colon else name


def is_asked_for(name: str, subcategory: str, names: Container[str]) -> bool:
    """Whether an icon is worth learning: see the module. names: those of all icons."""
    if subcategory in _UNASKED or _UNASKED_NAMES.search(name):
        return False
    words = name.split()
    if len(words) == 1:
        return True
    neutral = " ".join(_NEUTRAL.get(word, word) for word in words)
    bare = " ".join(word for word in words if word not in _NEUTRAL)
    return name in (neutral, bare) or not (neutral in names or bare in names)


def is_countable(name: str, subcategory: str) -> bool:
    """Whether "three ..." can be said of it: a short name in small letters, of a thing."""
    words = name.split()
    thing = subcategory in _THINGS or subcategory.split("-")[0] in _THINGS
    return thing and len(words) <= 2 and all(word.isalpha() and word.islower() for word in words)


def weight(name: str, category: str) -> float:
    """How often a thing is drawn, relative to others."""
    return _WEIGHTS.get(category, 1.0) if len(name.split()) <= 2 else _WEIGHT_OF_LONG_NAMES


def facts(row: dict[str, Any], picture: Image.Image) -> dict[str, Any]:
    """What scenes must know: the main colour, whether the thing can be counted, how often it is drawn, a caption."""
    name, category = spoken(row["name"]), row["category"]
    return {
        "name": name,
        "color": "" if category in _BODIES else main_color(np.asarray(picture)),
        "countable": is_countable(name, row["subcategory"]),
        "weight": weight(name, category),
        "text": f"{name}, {row['style']} style",
    }


def write_sprites(folder: Path, target: Path, size: int, styles: Container[str]) -> int:
    """Write every picture of these styles and metadata.jsonl; returns how many there are."""
    target.mkdir(parents=True)
    known, rows = described(folder), []
    names = {spoken(each["name"]) for each in known.values()}
    for name, style in SETS.items():
        if style not in styles:
            continue
        items = [item | labelled(item, known) for item in icons(folder, name)]
        items = [item for item in items if is_asked_for(spoken(item["name"]), item["subcategory"], names)]
        with ProcessPoolExecutor() as pool:
            pictures = pool.map(partial(rendered, size), items, chunksize=32)
            for item, picture in zip(items, pictures, strict=True):
                image = Image.open(io.BytesIO(picture)).convert("RGBA")
                if np.asarray(image)[..., 3].mean() < 2:  # nothing to see
                    continue
                row = {"file_name": f"{style}/{item['icon']}.png", "style": style}
                row |= {key: item[key] for key in ("icon", "name", "keywords", "category", "subcategory")}
                file = target / row["file_name"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(picture)
                rows.append(row | facts(row, image))
    (target / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return len(rows)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="node_modules with the packages")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--styles", nargs="+", choices=[*SETS.values()], default=[*SETS.values()])
    arguments = parser.parse_args()
    sprites = arguments.out / "sprites"
    if not sprites.exists():
        print(f"{write_sprites(arguments.packages, sprites, arguments.size, arguments.styles):,} sprites in {sprites}")


if __name__ == "__main__":
    main()
