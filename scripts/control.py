"""An edge ControlNet for the default model: its training pictures, and how well drawings follow edges.

    python scripts/control.py make FOLDER [--pictures 2000]
    latentdiff finetune scenes-64 FOLDER/train -o RUN --method controlnet --steps 3000
    python scripts/control.py measure FOLDER/test RUN/controlnet [--pictures 64]

`make` writes captioned procedural scenes and, apart from them, test scenes. `measure` asks for each test scene by its
caption, with the control of its edges, without control, and with another scene's edges, from the same noise, and prints
the F1 of the drawn edges against the asked ones at one pixel, with standard errors.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64


def make(folder: Path, count: int) -> None:
    from latentdiff.data.scenes import CATEGORIES, compose, describe, render
    from latentdiff.diffusion.noise import generator

    for name, number in (("train", count), ("test", max(64, count // 10))):
        (folder / name).mkdir(parents=True)
        lines = []
        for row in range(number):
            rng = generator(0, f"control {name}", row)
            scene = compose(describe(rng, CATEGORIES[row % len(CATEGORIES)]), rng)
            Image.fromarray(render(scene, SIZE)).save(folder / name / f"{row:05}.png")
            lines.append(json.dumps({"file_name": f"{row:05}.png", "text": scene.caption}) + "\n")
        (folder / name / "metadata.jsonl").write_text("".join(lines))


def near(edges: np.ndarray) -> np.ndarray:
    """Edges, widened by a pixel."""
    padded = np.pad(edges, 1)
    height, width = edges.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], 0)


def f1(drawn: np.ndarray, asked: np.ndarray) -> float:
    """Of edges (H, W), at one pixel."""
    if not drawn.any() or not asked.any():
        return float(drawn.any() == asked.any())
    precision, recall = (drawn & near(asked)).sum() / drawn.sum(), (asked & near(drawn)).sum() / asked.sum()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def measure(folder: Path, control: Path, count: int, output: Path | None) -> None:
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.core.annotators import canny

    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()][:count]
    pictures = [np.asarray(Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    edges = [canny(picture) for picture in pictures]
    pipe = LatentDiffusionPipeline.from_pretrained(device="cpu", runtime="torch")
    free = [pipe(line["text"], seed=row, output_type="uint8").images[0] for row, line in enumerate(lines)]
    pipe.load_controlnet(control)

    def drawn(hints):
        pairs = enumerate(zip(lines, hints, strict=True))
        return [
            pipe(line["text"], seed=row, control_image=h, output_type="uint8").images[0] for row, (line, h) in pairs
        ]

    steered, wrong = drawn(edges), drawn(edges[1:] + edges[:1])
    for name, images in (("with the control", steered), ("without", free), ("another scene's edges", wrong)):
        scores = [f1(canny(i)[..., 0] > 0, e[..., 0] > 0) for i, e in zip(images, edges, strict=True)]
        print(f"{name}: F1 {np.mean(scores):.3f} +- {np.std(scores) / len(scores) ** 0.5:.3f}")
    own = [f1(canny(i)[..., 0] > 0, e[..., 0] > 0) for i, e in zip(wrong, edges[1:] + edges[:1], strict=True)]
    print(f"another scene's edges, against those: F1 {np.mean(own):.3f} +- {np.std(own) / len(own) ** 0.5:.3f}")
    if output is not None:
        rows = [np.concatenate(each[:16], 1) for each in (edges, steered, free, wrong)]
        Image.fromarray(np.concatenate(rows)).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("control", type=Path, nargs="?")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--output", type=Path, help="a sheet: edges, with the control, without, with another's")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.folder, arguments.pictures or 2000)
    else:
        measure(arguments.folder, arguments.control, arguments.pictures or 64, arguments.output)


if __name__ == "__main__":
    main()
