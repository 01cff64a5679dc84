"""ControlNets for the default model: their training pictures, and how well drawings follow edges and maps.

    python scripts/control.py make FOLDER [--pictures 2000]
    latentdiff finetune scenes-64 FOLDER/train -o EDGES --method controlnet --steps 3000
    python scripts/control.py edges FOLDER EDGES/controlnet [--pictures 64]
    latentdiff finetune scenes-64 FOLDER/train -o MAPS --method controlnet --steps 3000 --control-pictures FOLDER/maps
    python scripts/control.py maps FOLDER MAPS/controlnet [--pictures 64]

`make` writes captioned procedural scenes with their semantic maps, a colour for each of the six shapes on black, and
apart from them test scenes. `edges` and `maps` draw each test scene from its caption, with its control, without
control, and with another scene's control, from the same noise. `edges` prints the F1 of the drawn edges against the
control's at one pixel; `maps` the intersection over union of the drawn foreground and the control's shapes. All have
standard errors.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
PALETTE = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240))  # of the shapes


def semantic_map(scene: "Scene") -> np.ndarray:  # noqa: F821 - of latentdiff.data.scenes
    """uint8 (64, 64, 3): each pixel in the colour of the shape that covers it, or black."""
    from latentdiff.data.scenes import SHAPES, coverage

    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for thing in scene.things:
        covered = coverage(thing.shape, thing.x, thing.y, thing.radius, SIZE, SIZE) > 0.5
        image[covered] = PALETTE[SHAPES.index(thing.shape)]
    return image


def make(folder: Path, count: int) -> None:
    from latentdiff.data.scenes import CATEGORIES, compose, describe, render
    from latentdiff.diffusion.noise import generator

    for name, number in (("train", count), ("test", max(64, count // 10))):
        maps = folder / ("maps" if name == "train" else "test-maps")
        (folder / name).mkdir(parents=True)
        maps.mkdir()
        lines = []
        for row in range(number):
            rng = generator(0, f"control {name}", row)
            scene = compose(describe(rng, CATEGORIES[row % len(CATEGORIES)]), rng)
            Image.fromarray(render(scene, SIZE)).save(folder / name / f"{row:05}.png")
            Image.fromarray(semantic_map(scene)).save(maps / f"{row:05}.png")
            lines.append(json.dumps({"file_name": f"{row:05}.png", "text": scene.caption}) + "\n")
        (folder / name / "metadata.jsonl").write_text("".join(lines))


def near(edges: np.ndarray) -> np.ndarray:
    """Edges, widened by a pixel."""
    padded = np.pad(edges, 1)
    height, width = edges.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], 0)


def f1(ours: np.ndarray, goal: np.ndarray) -> float:
    """Of edges (H, W), at one pixel."""
    if not ours.any() or not goal.any():
        return float(ours.any() == goal.any())
    precision, recall = (ours & near(goal)).sum() / ours.sum(), (goal & near(ours)).sum() / goal.sum()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def foreground(picture: np.ndarray) -> np.ndarray:
    """Where a picture differs from the colour that is most frequent on its border, bool (H, W)."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    colors, counts = np.unique(border // 8, axis=0, return_counts=True)
    background = border[(border // 8 == colors[counts.argmax()]).all(1)].mean(0)
    return np.abs(picture - background).max(-1) > 40


def overlap(ours: np.ndarray, goal: np.ndarray) -> float:
    """The intersection over union of two sets of pixels, bool (H, W)."""
    union = (ours | goal).sum()
    return float((ours & goal).sum() / union) if union else 1.0


def measure(kind: str, folder: Path, control: Path, count: int, output: Path | None) -> None:
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.core.annotators import canny

    lines = [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text().splitlines()][:count]
    source = folder / ("test" if kind == "edges" else "test-maps")
    pictures = [np.asarray(Image.open(source / line["file_name"]).convert("RGB")) for line in lines]
    hints = [canny(picture) for picture in pictures] if kind == "edges" else pictures
    pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", device="cpu", runtime="torch")
    free = [pipe(line["text"], seed=row, output_type="uint8").images[0] for row, line in enumerate(lines)]
    pipe.load_controlnet(control)

    def draw(hints):
        pairs = enumerate(zip(lines, hints, strict=True))
        return [
            pipe(line["text"], seed=row, control_image=h, output_type="uint8").images[0] for row, (line, h) in pairs
        ]

    def score(image, hint):
        goal = hint.any(-1)
        return f1(canny(image)[..., 0] > 0, goal) if kind == "edges" else overlap(foreground(image), goal)

    def say(what, images, goals):
        scores = [score(*pair) for pair in zip(images, goals, strict=True)]
        name = "F1" if kind == "edges" else "IoU"
        print(f"{what}: {name} {np.mean(scores):.3f} +- {np.std(scores) / len(scores) ** 0.5:.3f}")

    others = hints[1:] + hints[:1]
    steered, wrong = draw(hints), draw(others)
    say("with the control", steered, hints)
    say("without", free, hints)
    say("another scene's control", wrong, hints)
    say("another scene's control, against that", wrong, others)
    if output is not None:
        rows = [np.concatenate(each[:16], 1) for each in (hints, steered, free, wrong)]
        Image.fromarray(np.concatenate(rows)).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("make", "edges", "maps"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("control", type=Path, nargs="?")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--output", type=Path, help="a sheet: the controls, with them, without, with another's")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.folder, arguments.pictures or 2000)
    else:
        measure(arguments.action, arguments.folder, arguments.control, arguments.pictures or 64, arguments.output)


if __name__ == "__main__":
    main()
