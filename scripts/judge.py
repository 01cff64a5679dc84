"""Train the judge of `latentdiff evaluate --judge` on a library of sprites, and state its accuracy.

    python scripts/judge.py emoji/sprites judge

Each sample is a sprite in any size on any background, sometimes in another colour, cropped as the judge crops: with a
margin that differs by up to a tenth. A share of samples is blurred and noised, as a decoder does it. Accuracy is that
on renderings that training never draws. All styles are trained, also those that a model's training holds out. A
training that is stopped is resumed by the same command, from its last multiple of 200 steps.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm.auto import tqdm

from latentdiff.core.images import to_images
from latentdiff.core.processor import multiplies_bfloat16
from latentdiff.data.scenes import COLORS, SHAPES
from latentdiff.data.sprites.color import recolored
from latentdiff.data.sprites.description import GROUNDS
from latentdiff.data.sprites.library import Library
from latentdiff.data.sprites.scene import background, shape_pixels
from latentdiff.diffusion import noise
from latentdiff.evaluation.judge import Judge

ARCHITECTURE, SIDE = "regnety_002", 64
RATE, EVERY = 3e-3, 200


def sample(library: Library, row: int, rng: np.random.Generator) -> np.ndarray:
    """A square of the judge's size around a sprite, or behind the last one a shape, uint8 (SIDE, SIDE, 3)."""
    inner = int(rng.uniform(32, 112))  # pixels of the thing in a picture of 128
    if row < len(library):
        pixels = of_sprite(library, row, inner, rng)
    else:
        pixels = shape_pixels(SHAPES[row - len(library)], list(COLORS)[rng.integers(len(COLORS))], inner)
    side = round(inner * (1.16 + rng.uniform(-0.1, 0.1)))
    kind, names = rng.random(), rng.choice(list(GROUNDS), 2, replace=False)
    colors = ("white",) if kind < 0.4 else tuple(names[: 1 if kind < 0.75 else 2])
    picture = Image.fromarray(background(colors, rng.uniform(0, 2 * np.pi), max(side, 2)))
    left, top = ((side - length) // 2 + int(rng.integers(-2, 3)) for length in pixels.shape[1::-1])
    picture.paste(Image.fromarray(pixels), (left, top), Image.fromarray(pixels[..., 3]))
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    square = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    return np.clip(square + rng.normal(0, rng.uniform(0, 8), square.shape), 0, 255).astype(np.uint8)


def of_sprite(library: Library, row: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A sprite without its margin, sometimes in another colour, uint8 (H, W, 4), the longer side as given."""
    rgba = Image.fromarray(library.pixels(row))
    rgba = rgba.crop(rgba.getchannel("A").point(lambda alpha: 255 * (alpha > 25)).getbbox())
    scale = side / max(rgba.size)
    pixels = np.asarray(rgba.resize([max(2, round(n * scale)) for n in rgba.size], Image.Resampling.HAMMING))
    if library.sprites[row].color and rng.random() < 0.2:
        pixels = recolored(pixels, list(COLORS)[rng.integers(len(COLORS))])
    return pixels


def batch(library: Library, rows: np.ndarray, purpose: str, first: int) -> np.ndarray:
    """A sample of each row, uint8 (B, SIDE, SIDE, 3)."""
    return np.stack([sample(library, row, noise.generator(0, purpose, first + k)) for k, row in enumerate(rows)])


def names_of(library: Library) -> list[str]:
    """The name of each row: of the sprites, then of the shapes."""
    return [*(sprite.name for sprite in library.sprites), *SHAPES]


def train(library: Library, judge: Judge, steps: int, size: int, state: Path) -> None:
    """AdamW, one cycle. Batches are drawn by a thread while the network learns. state: the file to go on from."""
    classes = {name: number for number, name in enumerate(judge.classes)}
    labels = torch.tensor([classes[name] for name in names_of(library)])
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    start = restored(state, judge, optimizer)

    def draw(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = noise.generator(0, "judge rows", step).integers(len(labels), size=size)
        return rows, batch(library, rows, "judge", step * size)

    judge.train()
    with ThreadPoolExecutor(1) as pool, tqdm(range(start, steps), "judge", steps, initial=start, unit="step") as bar:
        ahead = pool.submit(draw, start)
        for step in bar:
            rows, squares = ahead.result()
            ahead = pool.submit(draw, step + 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
                logits = judge(to_images(squares))
            loss = functional.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.param_groups[0]["lr"] = rate(step / steps)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % EVERY == 0:
                keep(state, judge, optimizer, step + 1)


def rate(done: float) -> float:
    """The learning rate when a share of the steps is done: a tenth of them upwards, then half a cosine down to 0."""
    return RATE * (done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))


def keep(state: Path, judge: Judge, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, optimizer and step; the file is whole or the previous one."""
    tensors = {f"judge.{name}": tensor for name, tensor in judge.state_dict().items()} | {"step": torch.tensor(step)}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    state.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, state.with_suffix(".new"))
    state.with_suffix(".new").replace(state)


def restored(state: Path, judge: Judge, optimizer: torch.optim.Optimizer) -> int:
    """The step that was reached, with its weights and optimizer; 0 without a file."""
    if not state.is_file():
        return 0
    tensors = load_file(state)
    step = int(tensors.pop("step"))
    names = [name for name in tensors if name.startswith("judge.")]
    judge.load_state_dict({name.removeprefix("judge."): tensors.pop(name) for name in names})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        _, number, moment = name.split(".")
        moments.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return step


def accuracy(library: Library, judge: Judge, renderings: int) -> dict[str, float]:
    """The share of unseen renderings whose name is the judge's first, and among its first five, by style."""
    names, styles = (
        np.array(names_of(library)),
        [*(sprite.style for sprite in library.sprites), *["shape"] * len(SHAPES)],
    )
    rows = np.tile(np.arange(len(names)), renderings)
    best: list[list[str]] = []
    for first in range(0, len(rows), 256):
        best += judge.best(batch(library, rows[first : first + 256], "judge accuracy", first))
    right = np.array(
        [(names[row] == outcome[0], names[row] in outcome) for row, outcome in zip(rows, best, strict=True)]
    )
    of_style = np.array(styles)[rows]
    shares = {"accuracy@1": right[:, 0].mean(), "accuracy@5": right[:, 1].mean(), "renderings": len(rows)}
    shares |= {f"accuracy@1 {style}": right[of_style == style, 0].mean() for style in sorted(set(styles))}
    return {name: round(float(share), 4) for name, share in shares.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sprites", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--renderings", type=int, default=1, help="of each sprite, for the accuracy")
    given = parser.parse_args()
    library = Library(given.sprites)
    torch.manual_seed(0)
    judge = Judge(ARCHITECTURE, SIDE, sorted({*names_of(library)}))
    state = given.out / "training.safetensors"
    train(library, judge, given.steps, given.batch_size, state)
    judge.save(given.out)
    state.unlink(missing_ok=True)
    print(json.dumps(accuracy(library, Judge.load(given.out), given.renderings), indent=1))


if __name__ == "__main__":
    main()
