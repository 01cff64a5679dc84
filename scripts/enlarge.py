"""Super-resolution beside interpolation, and a cascade from 64 to 256 pixels.

    python scripts/enlarge.py make FOLDER [--pictures 4000]
    latentdiff train configs/enlarge-4.toml --data FOLDER/train -o RUN
    python scripts/enlarge.py measure FOLDER RUN/model [--pictures 48] [--output enlarged.png]

`make` writes parts of 32 pixels of procedural scenes of 256, and of other scenes parts of 64. `measure` makes the test
parts four times smaller and enlarges them again. It prints the peak signal-to-noise ratio (dB) and the structural
similarity (Wang et al. 2004) to the true parts, with standard errors: of bicubic and Lanczos interpolation, of the
model's single pictures, and of the mean of four, for two noise levels. A mean is nearer to the truth than a
picture that looks like one. Then the default model draws six of the captions, and the cascade enlarges what it draws.
It prints the root mean square distance (of 255) of the enlarged pictures, made small again, to those that were drawn,
and the sharpness of the cascade and of Lanczos: the mean step from pixel to pixel over that of true scenes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

SIDE, SCALE = 256, 4
PARTS = {"train": 32, "test": 64}  # pixels
CASCADES = 6


def scene_of(name: str, row: int):
    from latentdiff.data.scenes import CATEGORIES, compose, describe
    from latentdiff.diffusion.noise import generator

    rng = generator(0, f"enlarge {name}", row)
    return compose(describe(rng, CATEGORIES[row % len(CATEGORIES)]), rng), rng


def make(folder: Path, count: int) -> None:
    from latentdiff.data.scenes import render

    for name, number in (("train", count), ("test", max(48, count // 20))):
        (folder / name).mkdir(parents=True)
        for row in range(number):
            scene, rng = scene_of(name, row)
            thing = scene.things[rng.integers(len(scene.things))]  # around a point of a thing, where the edges are
            place = np.array([thing.y, thing.x]) + thing.radius * rng.uniform(-1, 1, 2)
            part = PARTS[name]
            top, left = np.clip(place * SCALE - part / 2, 0, SIDE - part).astype(int)
            picture = render(scene, SIDE)[top : top + part, left : left + part]
            Image.fromarray(picture).save(folder / name / f"{row:05}.png")


def resized(picture: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), how))


def likeness(picture: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, and SSIM, of pictures (H, W, 3) from 0 to 255."""
    error = np.square(picture.astype(float) - true).mean()
    both = [torch.from_numpy(np.asarray(p, np.float32)).permute(2, 0, 1)[None] for p in (picture, true)]
    return 10 * np.log10(255**2 / max(error, 1e-9)), float(structural_similarity_index_measure(*both, data_range=255.0))


def say(what: str, scores: list[tuple[float, float]]) -> None:
    each = np.array(scores)
    (psnr, ssim), errors = each.mean(0), each.std(0) / len(each) ** 0.5
    print(f"{what}: PSNR {psnr:.2f} +- {errors[0]:.2f} dB, SSIM {ssim:.4f} +- {errors[1]:.4f}")


def sharpness(pictures: np.ndarray) -> float:
    """The mean absolute step from pixel to pixel."""
    values = pictures.astype(float)
    return float(np.abs(np.diff(values, axis=1)).mean() + np.abs(np.diff(values, axis=2)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("make", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--output", type=Path, help="a sheet: small, Lanczos, the model, the truth; then the cascade")
    given = parser.parse_args()
    if given.action == "make":
        make(given.folder, given.pictures or 4000)
    else:
        measure(given.folder, given.model, given.pictures or 48, given.output)


def measure(folder: Path, model: str, count: int, output: Path | None) -> None:
    from latentdiff import LatentDiffusionPipeline

    true = []
    for file in sorted((folder / "test").glob("*.png"))[:count]:
        with Image.open(file) as picture:
            true.append(np.asarray(picture.convert("RGB")))
    part = PARTS["test"]
    small = [resized(picture, part // SCALE, Image.Resampling.BICUBIC) for picture in true]
    ways = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
    enlarged = {name: [resized(picture, part, how) for picture in small] for name, how in ways.items()}
    for name, pictures in enlarged.items():
        say(name, [likeness(*pair) for pair in zip(pictures, true, strict=True)])
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    options = {"num_images_per_prompt": 4, "output_type": "uint8"}
    for level in (0, 20):
        sample = [pipe("", image=p, seed=4 * row, noise_level=level, **options).images for row, p in enumerate(small)]
        say(f"the model, noise level {level}", [likeness(d[0], t) for d, t in zip(sample, true, strict=True)])
        say("    the mean of four", [likeness(d.mean(0), t) for d, t in zip(sample, true, strict=True)])
    rows = [
        [resized(p, part, Image.Resampling.NEAREST) for p in small],
        enlarged["Lanczos"],
        [d[0] for d in sample],
        true,
    ]
    cascade(model, output, np.concatenate([np.concatenate(list(row[:24]), 1) for row in rows]))


def cascade(model: str, output: Path | None, above: np.ndarray) -> None:
    """Print the figures of the cascade; write its pictures under others."""
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.data.scenes import render

    scenes = [scene_of("test", row)[0] for row in range(CASCADES)]
    base = LatentDiffusionPipeline.from_pretrained("scenes-64", device="cpu", runtime="torch")
    prompts = [scene.caption for scene in scenes]
    first = base(prompts, seed=0, output_type="uint8").images
    base.load_cascade(model)
    last = base(prompts, seed=0, batch_size=1, output_type="uint8").images
    back = np.stack([resized(picture, SIDE // SCALE, Image.Resampling.BICUBIC) for picture in last])
    lanczos = np.stack([resized(picture, SIDE, Image.Resampling.LANCZOS) for picture in first])
    print(f"the cascade: made small again {np.sqrt(np.square(back.astype(float) - first).mean()):.2f} of 255 away")
    truth = sharpness(np.stack([render(scene, SIDE) for scene in scenes]))
    shares = f"cascade {sharpness(last) / truth:.3f}, Lanczos {sharpness(lanczos) / truth:.3f}"
    print(f"sharpness over that of true scenes: {shares}")
    if output is not None:
        below = np.concatenate([np.concatenate(list(row), 1) for row in (lanczos, last)])
        Image.fromarray(np.concatenate([above, below])).save(output)


if __name__ == "__main__":
    main()
