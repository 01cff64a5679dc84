"""The emoji data set: pictures of four open icon sets, drawn from their vectors, with names and keywords.

    npm install @iconify-json/{noto,fluent-emoji,fluent-emoji-flat,twemoji} emojibase-data
    pip install resvg-py
    python scripts/emoji.py node_modules emoji            # emoji/sprites: RGBA pictures and metadata.jsonl
    python scripts/emoji.py node_modules emoji --scenes 40000   # and emoji/scenes: sprites on backgrounds

Licences: noto Apache-2.0 (Google), fluent-emoji and fluent-emoji-flat MIT (Microsoft), twemoji CC-BY-4.0 (Twitter).
Icons that differ from another one by skin tone only are left out.
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

from latentdiff.diffusion import noise

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
    found = {}
    for entry in data:
        found[plain(entry["hexcode"])] = {
            "name": entry["label"],
            "keywords": entry.get("tags", []),
            "category": groups["groups"].get(str(entry.get("group")), "symbols"),
            "subcategory": groups["subgroups"].get(str(entry.get("subgroup")), "other-symbol"),
        }
    return found


def plain(code: str) -> str:
    """Code points in lower case, without variation selectors and leading zeros."""
    return "-".join(point.lower().lstrip("0") for point in code.split("-") if point.lower() != "fe0f")


def rendered(size: int, item: dict[str, Any]) -> bytes:
    """The icon as an RGBA PNG of size x size."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=item["svg"], width=size, height=size))


def captions(row: dict[str, Any]) -> list[str]:
    """From the bare name to the full caption: style, name, keywords."""
    name, style, words = row["name"], row["style"], [w for w in row["keywords"] if w != row["name"]]
    return list(dict.fromkeys([name, f"{name}, {style} style", f"{name}, {style} style, {', '.join(words[:4])}"]))


def write_sprites(folder: Path, target: Path, size: int) -> int:
    """Write every picture and metadata.jsonl; returns how many there are."""
    target.mkdir(parents=True)
    known, rows = described(folder), []
    for name, style in SETS.items():
        items = list(icons(folder, name))
        with ProcessPoolExecutor() as pool:
            pictures = pool.map(partial(rendered, size), items, chunksize=32)
            for item, picture in zip(items, pictures, strict=True):
                alpha = np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA"))[..., 3]
                if alpha.mean() < 2:  # nothing to see
                    continue
                spoken = {"name": item["icon"].replace("-", " "), "keywords": [], "category": "other"}
                row = {"file_name": f"{style}/{item['icon']}.png", "style": style, "icon": item["icon"]}
                row |= spoken | known.get(plain(item["code"]), {})
                file = target / row["file_name"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(picture)
                rows.append(row | {"text": captions(row)})
    (target / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def scene(sprites: list[Path], size: int, seed: int, index: int) -> Image.Image:
    """One to four sprites on a plain or graded background, a function of (seed, index)."""
    rng = noise.generator(seed, "emoji scene", index)
    picture = Image.fromarray(background(rng, size))
    count = int(rng.choice([1, 2, 3, 4], p=[0.7, 0.15, 0.08, 0.07]))
    for _ in range(count):
        side = int(size * (rng.uniform(0.6, 1.0) if count == 1 else rng.uniform(0.25, 0.6)))
        sprite = Image.open(sprites[rng.integers(len(sprites))]).convert("RGBA")
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        place = tuple(int(corner) for corner in rng.integers(0, size - side + 1, 2))
        picture.paste(sprite, place, sprite)
    return picture


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """White half of the time, else a colour, or a linear gradient between two: uint8 (size, size, 3)."""
    kind = rng.random()
    first, last = rng.integers(0, 256, (2, 3))
    if kind < 0.5:
        first = last = np.array([255, 255, 255])
    elif kind < 0.75:
        last = first
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    share = np.clip(0.5 + (np.cos(angle) * x + np.sin(angle) * y), 0, 1)[..., None]
    return np.rint(first * (1 - share) + last * share).astype(np.uint8)


def _write_scene(sprites: list[Path], target: Path, size: int, seed: int, index: int) -> None:
    scene(sprites, size, seed, index).save(target / f"{index:06d}.png", compress_level=1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="node_modules with the packages")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=0, help="composed pictures for the autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sprites = given.out / "sprites"
    if not sprites.exists():
        print(f"{write_sprites(given.packages, sprites, given.size):,} sprites in {sprites}")
    if given.scenes:
        (given.out / "scenes").mkdir()
        files = sorted(sprites.glob("*/*.png"))
        make = partial(_write_scene, files, given.out / "scenes", given.size, given.seed)
        with ProcessPoolExecutor() as pool:
            list(pool.map(make, range(given.scenes), chunksize=64))
        print(f"{given.scenes:,} scenes in {given.out / 'scenes'}")


if __name__ == "__main__":
    main()
