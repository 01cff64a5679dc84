"""Super-resolution beside interpolation, and a cascade from 64 to 256 pixels.

    python scripts/enlarge.py make FOLDER [--pictures 4000]
    latentdiff train configs/enlarge-4.toml --data FOLDER/train -o RUN
    python scripts/enlarge.py measure FOLDER RUN/model [--pictures 32] [--output enlarged.png]

`make` writes parts of 32 pixels of procedural scenes of 256, and apart from them whole test scenes. `measure` makes the
test scenes four times smaller and enlarges them again, and prints the peak signal-to-noise ratio (dB) and the
structural similarity (Wang et al. 2004) to the true scenes, with standard errors: of bicubic and Lanczos interpolation,
of the model's single pictures, and of the mean of four, for two noise levels. A mean is nearer to the truth than a
picture that looks like one. Then the default model draws captions of test scenes, and the cascade enlarges what it
draws: printed are the root mean square distance of the enlarged pictures, made small again, to those that were drawn
(of 255), and the mean step from pixel to pixel over that of true scenes, of the cascade and of Lanczos: the sharpness.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

SIDE, PART, SCALE = 256, 32, 4


def make(folder: Path, count: int) -> None:
    from latentdiff.data.scenes import CATEGORIES, compose, describe, render
    from latentdiff.diffusion.noise import generator

    for name, number in (("train", count), ("test", max(32, count // 20))):
        (folder / name).mkdir(parents=True)
        lines = []
        for row in range(number):
            rng = generator(0, f"enlarge {name}", row)
            scene = compose(describe(rng, CATEGORIES[row % len(CATEGORIES)]), rng)
            picture = render(scene, SIDE)
            if name == "train":  # around a point of a thing, where the edges are
                thing = scene.things[rng.integers(len(scene.things))]
                place = np.array([thing.y, thing.x]) + thing.radius * rng.uniform(-1, 1, 2)
                top, left = np.clip(place * SCALE - PART / 2, 0, SIDE - PART).astype(int)
                picture = picture[top : top + PART, left : left + PART]
            Image.fromarray(picture).save(folder / name / f"{row:05}.png")
            lines.append(json.dumps({"file_name": f"{row:05}.png", "text": scene.caption}) + "\n")
        if name == "test":
            (folder / name / "metadata.jsonl").write_text("".join(lines))


def resized(picture: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), how))


def likeness(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, and SSIM, of pictures (H, W, 3) from 0 to 255."""
    error = np.square(found.astype(float) - true).mean()
    both = [torch.from_numpy(np.asarray(p, np.float32)).permute(2, 0, 1)[None] for p in (found, true)]
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
        measure(given.folder, given.model, given.pictures or 32, given.output)


def measure(folder: Path, model: str, count: int, output: Path | None) -> None:
    from latentdiff import LatentDiffusionPipeline

    lines = [json.loads(line) for line in (folder / "test" / "metadata.jsonl").read_text().splitlines()][:count]
    true = []
    for line in lines:
        with Image.open(folder / "test" / line["file_name"]) as picture:
            true.append(np.asarray(picture.convert("RGB")))
    small = [resized(picture, SIDE // SCALE, Image.Resampling.BICUBIC) for picture in true]
    ways = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
    enlarged = {name: [resized(picture, SIDE, how) for picture in small] for name, how in ways.items()}
    for name, pictures in enlarged.items():
        say(name, [likeness(*pair) for pair in zip(pictures, true, strict=True)])
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    asked = {"num_images_per_prompt": 4, "output_type": "uint8"}
    for level in (0, 20):
        drawn = [pipe("", image=p, seed=4 * row, noise_level=level, **asked).images for row, p in enumerate(small)]
        say(f"the model, noise level {level}", [likeness(d[0], t) for d, t in zip(drawn, true, strict=True)])
        say("    the mean of four", [likeness(d.mean(0), t) for d, t in zip(drawn, true, strict=True)])
    base = LatentDiffusionPipeline.from_pretrained(device="cpu", runtime="torch")
    prompts = [line["text"] for line in lines]
    first = base(prompts, seed=0, output_type="uint8").images
    base.load_cascade(model)
    last = base(prompts, seed=0, output_type="uint8").images
    back = np.stack([resized(picture, SIDE // SCALE, Image.Resampling.BICUBIC) for picture in last])
    lanczos = np.stack([resized(picture, SIDE, Image.Resampling.LANCZOS) for picture in first])
    print(f"the cascade: made small again {np.sqrt(np.square(back.astype(float) - first).mean()):.2f} of 255 away")
    truth = sharpness(np.stack(true))
    shares = f"cascade {sharpness(last) / truth:.3f}, Lanczos {sharpness(lanczos) / truth:.3f}"
    print(f"sharpness over that of true scenes: {shares}")
    if output is not None:
        little = [resized(picture, SIDE, Image.Resampling.NEAREST) for picture in small]
        rows = [little, enlarged["Lanczos"], [each[0] for each in drawn], true, lanczos, last]
        Image.fromarray(np.concatenate([np.concatenate(list(row[:6]), 1) for row in rows])).save(output)


if __name__ == "__main__":
    main()
