"""Classes: pictures of scikit-learn's handwritten digits to learn from, and how many drawn ones a classifier reads.

    pip install scikit-learn
    python scripts/digits.py make FOLDER
    latentdiff train configs/digits-8.toml --data FOLDER/train -o RUN
    python scripts/digits.py measure FOLDER RUN/model [--pictures 100] [--grid digits.png]

`make` writes the 1,797 pictures of 8 x 8 pixels into folders train/0 to train/9, and a random fifth into
test/. `measure` trains a support vector machine on the training pictures, which shares nothing with the model. It
prints how many of the test pictures the machine reads; how many of the drawn ones, class by class, with standard
errors; and how many of the drawn ones are nearer to a training picture than to a test picture, among as many of both:
a half if the model copies none.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0


def make(folder: Path) -> None:
    """Write the pictures, white on black."""
    from sklearn.datasets import load_digits

    data = load_digits()
    held = np.random.default_rng(SEED).random(len(data.target)) < 0.2
    for number, (pixels, target, is_held) in enumerate(zip(data.images, data.target, held, strict=True)):
        place = folder / ("test" if is_held else "train") / str(target)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels * 255 / 16)).save(place / f"{number:04}.png")


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 64) in [0, 1] and their digits."""
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)).ravel() for file in files]) / 255
    return pixels, np.array([int(file.parent.name) for file in files])


def share(right: np.ndarray) -> str:
    """A share with its standard error."""
    mean = right.mean()
    return f"{mean:.3f} +- {math.sqrt(mean * (1 - mean) / len(right)):.3f}"


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The distance of each point to the nearest of the others."""
    return np.sqrt(((points[:, None] - others[None]) ** 2).sum(-1)).min(1)


def measure(folder: Path, model: str, pictures: int, grid: Path | None) -> None:
    """Print the shares."""
    from sklearn.svm import SVC

    from latentdiff import LatentDiffusionPipeline

    (known, names), (held, truth) = read(folder / "train"), read(folder / "test")
    classifier = SVC(gamma=0.5).fit(known, names)
    print(f"the classifier reads {share(classifier.predict(held) == truth)} of {len(held)} test pictures")
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    picture = pipe([str(digit) for digit in range(10)], seed=SEED, num_images_per_prompt=pictures, output_type="uint8")
    pixels = picture.images.reshape(10, pictures, 64) / 255
    right = np.stack([classifier.predict(of_class) == digit for digit, of_class in enumerate(pixels)])
    for digit, of_class in enumerate(right):
        print(f"{digit}: {share(of_class)}")
    print(f"all: {share(right.ravel())} of {right.size} drawn pictures")
    same = np.random.default_rng(SEED).choice(len(known), len(held), replace=False)  # as many as test pictures
    nearer = nearest(pixels.reshape(-1, 64), known[same]) < nearest(pixels.reshape(-1, 64), held)
    print(f"nearer to a training picture than to a test picture, of as many: {share(nearer)}")
    if grid is not None:
        cells = picture.images.reshape(10, pictures, 8, 8)
        rows = [np.concatenate(list(of_class[:10]), 1) for of_class in cells]
        Image.fromarray(np.concatenate(rows)).resize((640, 640), Image.Resampling.NEAREST).save(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("model")
    measuring.add_argument("--pictures", type=int, default=100)
    measuring.add_argument("--grid", type=Path)
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder)
    else:
        measure(given.folder, given.model, given.pictures, given.grid)


if __name__ == "__main__":
    main()
