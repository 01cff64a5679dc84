"""Procedural captioned scenes: a description, its caption, and a picture that satisfies it.

A `Description` holds exactly what a caption states. From it follow the caption (by template) and a `Scene`
(a layout that satisfies the description), and from the scene the picture. `evaluation/oracle.py` goes the other
way, from a picture to its objects, so that a drawn picture can be compared with its prompt.

Randomness is an argument: a caller that keys its generator by (seed, index) gets the same scene for that
index everywhere and in any order. Pictures are uint8 (H, W, 3), anti-aliased by the signed distance of each
pixel centre to the outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 30),
    "green": (30, 150, 60),
    "cyan": (0, 175, 200),
    "blue": (30, 70, 220),
    "purple": (130, 40, 170),
    "pink": (255, 80, 160),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (200, 200, 200),
    "black": (0, 0, 0),
}
CATEGORIES = ("single", "two", "counting", "colors", "position", "binding")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {
    (0, 0): "in the center",
    (-1, 0): "on the left",
    (1, 0): "on the right",
    (0, -1): "at the top",
    (0, 1): "at the bottom",
    (-1, -1): "in the top left corner",
    (1, -1): "in the top right corner",
    (-1, 1): "in the bottom left corner",
    (1, 1): "in the bottom right corner",
}
RADII = {"small": (6.5, 8.5), "": (10.0, 12.5), "large": (14.5, 18.0)}  # pixels, by stated size
NUMBERS = {2: "two", 3: "three", 4: "four"}
EVEN_MIX = (1 / 6,) * 6  # shares of CATEGORIES
GAP = 3.0  # pixels of background between the bounding boxes of two objects, and to the border

# Never drawn in training: one colour a shape, each used once, so that every shape and every colour is known
# but these pairs are new.
HELD_OUT = frozenset(zip(SHAPES, ("purple", "red", "cyan", "yellow", "blue", "pink"), strict=True))
PAIRS = tuple((s, c) for s in SHAPES for c in COLORS if (s, c) not in HELD_OUT)


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape and colour."""

    shape: str
    color: str
    count: int = 1


@dataclass(frozen=True)
class Description:
    """What a caption states; an empty value states nothing.

    `relation` holds between the first and the second group ("left of": the first is left of the second).
    `place` is the cell of a 3 x 3 grid, (-1..1, -1..1), x to the right, y down.
    """

    category: str
    groups: tuple[Group, ...]
    relation: str = ""
    place: tuple[int, int] | None = None
    size: str = ""
    background: str = ""

    @property
    def held_out(self) -> bool:
        """Whether any (shape, colour) pair in it is one that training never draws."""
        return any((g.shape, g.color) in HELD_OUT for g in self.groups)


@dataclass(frozen=True)
class Thing:
    """One object: centre and half width in pixels, x to the right, y down."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A layout: what is drawn, on what, and the caption that describes it."""

    background: str
    things: tuple[Thing, ...]
    description: Description
    caption: str


def describe(rng: np.random.Generator, category: str, *, held_out: bool = False) -> Description:
    """Draw a description of one category; with `held_out`, its first object is a pair that training never shows."""
    groups = _groups(rng, category, held_out)
    background = str(rng.choice(list(BACKGROUNDS))) if category == "colors" or rng.random() < 0.5 else ""
    if category == "single":
        cells = tuple(PLACES)
        return Description(
            category,
            groups,
            place=cells[rng.integers(len(cells))] if rng.random() < 0.75 else None,
            size=str(rng.choice(list(RADII))),
            background=background,
        )
    relation = ""
    if category == "position" or (category in ("two", "binding") and rng.random() < 0.4):
        relation = RELATIONS[rng.integers(len(RELATIONS))]
    return Description(category, groups, relation=relation, background=background)


def _groups(rng: np.random.Generator, category: str, held_out: bool) -> tuple[Group, ...]:
    """The objects of a category: one, several alike, two of one colour (two) or two of two colours."""
    first = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))] if held_out else PAIRS[rng.integers(len(PAIRS))]
    if category in ("single", "colors"):
        return (Group(*first),)
    if category == "counting":
        return (Group(*first, count=int(rng.integers(2, 5))),)
    same_color = category == "two"
    others = [p for p in PAIRS if p[0] != first[0] and (p[1] == first[1]) == same_color]
    return (Group(*first), Group(*others[rng.integers(len(others))]))


def twin(description: Description, rng: np.random.Generator) -> Description:
    """The same objects with one fact changed: a hard negative for contrastive training.

    The relation inverted, the colours swapped, another count, place or background. Never a held-out pair.
    """
    groups = description.groups
    if description.relation:
        return replace(description, relation=INVERSE[description.relation])
    if len(groups) == 2 and groups[0].color != groups[1].color:
        swapped = (replace(groups[0], color=groups[1].color), replace(groups[1], color=groups[0].color))
        changed = replace(description, groups=swapped)
    elif groups[0].count > 1:
        others = [n for n in NUMBERS if n != groups[0].count]
        changed = replace(description, groups=(replace(groups[0], count=int(rng.choice(others))),))
    elif description.place is not None:
        others_at = [place for place in PLACES if place != description.place]
        changed = replace(description, place=others_at[rng.integers(len(others_at))])
    else:
        return describe(rng, description.category)
    return describe(rng, description.category) if changed.held_out else changed


def caption(description: Description, rng: np.random.Generator) -> str:
    """One of several sentences that state everything in the description and nothing else."""
    subject = _subject(description, rng)
    if description.background:
        ground = f"{article(description.background)} {description.background} background"
        joined = (f"{subject} on {ground}", f"{subject} against {ground}", f"on {ground}, {subject}")
        subject = joined[rng.integers(3)]
        if subject.startswith("on "):
            return subject
    frames = ("{}", "{}", "{}", "a picture of {}", "a drawing of {}", "an image of {}")
    return frames[rng.integers(len(frames))].format(subject)


def _subject(description: Description, rng: np.random.Generator) -> str:
    first, *rest = (_noun_phrase(group, description.size, rng) for group in description.groups)
    if not rest:
        return f"{first} {PLACES[description.place]}" if description.place else first
    relation, second = description.relation, rest[0]
    if not relation:
        return f"{first} and {second}"
    if rng.random() < 0.3:  # the same fact seen from the other object
        first, second, relation = second, first, INVERSE[relation]
    if relation.endswith("of") and rng.random() < 0.5:
        relation = f"to the {relation}"
    return f"{first} {relation} {second}"


def _noun_phrase(group: Group, size: str, rng: np.random.Generator) -> str:
    words = f"{size} {group.color} {group.shape}".strip()
    if group.count == 1:
        return f"{article(words)} {words}"
    number = str(group.count) if rng.random() < 0.3 else NUMBERS[group.count]
    return f"{number} {words}{'es' if words.endswith('s') else 's'}"


def article(words: str) -> str:
    """The article of some words: "an" before a vowel, else "a"."""
    return "an" if words[0] in "aeiou" else "a"


# --- layouts -------------------------------------------------------------------------------------------


def scene(
    rng: np.random.Generator,
    category: str | None = None,
    *,
    mix: Sequence[float] = EVEN_MIX,
    held_out: bool = False,
) -> Scene:
    """Draw a description, its caption and a layout that satisfies it; without a category, by the shares of the mix."""
    if category is None:
        category = str(rng.choice(CATEGORIES, p=np.asarray(mix) / sum(mix)))
    return compose(describe(rng, category, held_out=held_out), rng)


def compose(description: Description, rng: np.random.Generator) -> Scene:
    """A caption of a description and a layout that satisfies it."""
    sentence = caption(description, rng)
    background = description.background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(background, layout(description, rng), description, sentence)


def layout(description: Description, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Objects in general position that satisfy the description, no two bounding boxes closer than GAP."""
    kinds = [g for g in description.groups for _ in range(g.count)]
    if len(kinds) == 1:
        radius = rng.uniform(*RADII[description.size])
        cells = tuple(PLACES)
        place = cells[rng.integers(len(cells))] if description.place is None else description.place
        centers = [in_cell(place, radius, rng)]
        radii = [radius]
    elif len(description.groups) == 2:
        radii = list(rng.uniform(8.5, 11.5, 2))
        centers = related(description.relation or RELATIONS[rng.integers(4)], radii, rng)
    else:
        radii = list(rng.uniform(7.5, 12.0 - len(kinds), 1).repeat(len(kinds)))
        centers = scattered(radii, rng)
    return tuple(
        Thing(g.shape, g.color, float(x), float(y), float(r))
        for g, (x, y), r in zip(kinds, centers, radii, strict=True)
    )


def in_cell(place: tuple[int, int], radius: float, rng: np.random.Generator) -> tuple[float, float]:
    """A centre near the middle (|offset| < 2) or 0.65 to 1 of the way to the border, by cell."""
    reach = SIZE / 2 - GAP - radius
    offset = [rng.uniform(-2, 2) if side == 0 else side * reach * rng.uniform(0.65, 1) for side in place]
    return SIZE / 2 + offset[0], SIZE / 2 + offset[1]


def related(relation: str, radii: Sequence[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Two centres along one axis, the first before the second for "left of" and "above"."""
    slack = SIZE - 3 * GAP - 2 * sum(radii)
    cuts = np.sort(rng.uniform(0, max(slack, 0.0), 2))
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    along = np.empty(2)
    along[order[0]] = GAP + cuts[0] + radii[order[0]]
    along[order[1]] = 2 * GAP + cuts[1] + 2 * radii[order[0]] + radii[order[1]]
    across = SIZE / 2 + rng.uniform(-10, 10) + rng.uniform(-4, 4, 2)
    if relation in ("above", "below"):
        return [(across[i], along[i]) for i in (0, 1)]
    return [(along[i], across[i]) for i in (0, 1)]


def holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether a relation holds between two centres, y downwards: they lie further apart along its axis than across."""
    axis = 0 if relation in ("left of", "right of") else 1
    along, across = second[axis] - first[axis], second[1 - axis] - first[1 - axis]
    return (along if relation in ("left of", "above") else -along) > abs(across)


def scattered(radii: Sequence[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres anywhere, bounding boxes apart: the first good one of many candidates drawn at once."""
    r = np.asarray(radii)
    while True:
        centers = rng.uniform(GAP + r[:, None], SIZE - GAP - r[:, None], (64, len(r), 2))
        apart = np.abs(centers[:, :, None] - centers[:, None]).max(-1) >= r[:, None] + r + GAP
        good = np.flatnonzero((apart | np.eye(len(r), dtype=bool)).all((1, 2)))
        if good.size:
            return [(float(x), float(y)) for x, y in centers[good[0]]]


# --- pictures ------------------------------------------------------------------------------------------


def coverage(shape: str, x: float, y: float, radius: float, width: int, height: int) -> NDArray[np.float32]:
    """The share of each pixel that a shape covers, (height, width) in [0, 1]."""
    u = np.abs(np.arange(width, dtype=np.float32) + np.float32(0.5 - x))[None, :]
    v = (np.arange(height, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    return np.clip(np.float32(0.5) - _signed_distance(shape, u, v, np.float32(radius)), 0, 1)


def _signed_distance(shape: str, u: NDArray[np.float32], v: NDArray[np.float32], r: np.float32) -> NDArray[np.float32]:
    """Distance in pixels to the outline, negative inside, exact near straight edges. u >= 0 by symmetry."""
    if shape == "circle":
        return np.hypot(u, v) - r
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72 * r) - 0.28 * r
    if shape == "square":
        return np.maximum(u, np.abs(v)) - r * np.float32(0.9)
    if shape == "cross":
        v = np.abs(v)
        arm = r * np.float32(0.34)
        return np.minimum(np.maximum(u - r, v - arm), np.maximum(u - arm, v - r))
    if shape == "triangle":
        return np.maximum(v - r * np.float32(0.8), (u * 2 - v - r) / np.float32(np.sqrt(5)))
    return _star_distance(u, v, r)


def _star_distance(u: NDArray[np.float32], v: NDArray[np.float32], r: np.float32) -> NDArray[np.float32]:
    """A five-pointed star: each pixel is turned into the wedge of its nearest tip, where one edge bounds it."""
    angle = np.arctan2(u, -v)  # 0 at the upper tip
    wedge = np.float32(2 * np.pi / 5)
    angle = np.abs((angle + wedge / 2) % wedge - wedge / 2)
    length = np.hypot(u, v)
    px, py = length * np.sin(angle), length * np.cos(angle)
    inner = np.float32(0.45) * r
    ax, ay = inner * np.sin(wedge / 2), inner * np.cos(wedge / 2)  # inner corner; the tip is (0, r)
    edge = np.hypot(ax, r - ay)
    return (px * (r - ay) + (py - r) * ax) / edge


def render(scene: Scene, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 (size, size, 3)."""
    scale = size / SIZE
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
        x0, x1 = max(0, int(x - r) - 1), min(size, int(x + r) + 3)
        y0, y1 = max(0, int(y - r) - 1), min(size, int(y + r) + 3)
        alpha = coverage(thing.shape, x - x0, y - y0, r, x1 - x0, y1 - y0)[..., None]
        window = image[y0:y1, x0:x1]
        window += alpha * (np.asarray(COLORS[thing.color], np.float32) - window)
    return np.rint(image).astype(np.uint8)
