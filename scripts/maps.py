"""Semantic maps drawn by diffusion, beside a U-Net that is trained on the same pairs with cross-entropy.

    python scripts/control.py make scenes --pictures 3000
    latentdiff train configs/maps-32.toml
    python scripts/maps.py scenes runs/maps-32/model [--pictures 64] [--samples 8] [--steps 2000] [--output maps.png]

For each test picture several maps are drawn, from other noise. Each pixel has the class whose colour is nearest. It
prints, over seven classes with the background, the mean intersection over union of single samples, of the majority of
the samples, and of a U-Net trained with cross-entropy for as many steps, with standard errors over pictures; and the
calibration of the last two: the mean difference of confidence and accuracy over ten bins of confidence, weighted by
their pixels (Guo et al. 2017). The confidence of the samples is the share that agrees with the majority, that of the
U-Net its largest probability.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from control import PALETTE
from diffusers import UNet2DModel
from PIL import Image
from torch import nn

COLORS = np.array([(0, 0, 0), *PALETTE])
SIDE, CHANNELS, BATCH, RATE = 32, (32, 64, 96), 16, 5e-4  # of the config


def classes_of(pictures: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> the index of the nearest colour."""
    return np.square(pictures[..., None, :].astype(float) - COLORS).sum(-1).argmin(-1)


def read(folder: Path, names: list[str], how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    pictures = []
    for name in names:
        with Image.open(folder / name) as picture:
            pictures.append(np.asarray(picture.convert("RGB").resize((SIDE, SIDE), how)))
    return np.stack(pictures)


def overlaps(classes: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The intersection over union of each picture (N, H, W), averaged over the classes that are in it."""
    scores = []
    for one, other in zip(classes, true, strict=True):
        present = np.unique(other)
        scores.append(np.mean([((one == c) & (other == c)).sum() / ((one == c) | (other == c)).sum() for c in present]))
    return np.array(scores)


def calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error over ten bins of confidence."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    return float(
        sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    )


def by_cross_entropy(pictures: np.ndarray, maps: np.ndarray, steps: int) -> nn.Module:
    """A U-Net of the same widths, trained on the same pairs."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=len(COLORS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 2,
        norm_num_groups=16,
    )
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = np.random.default_rng(0)
    for _ in range(steps):
        rows = generator.integers(len(pictures), size=BATCH)
        output = network(as_values(pictures[rows]), 0).sample
        loss = nn.functional.cross_entropy(output, torch.from_numpy(maps[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def as_values(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def say(what: str, scores: np.ndarray, error: float | None = None) -> None:
    more = "" if error is None else f", calibration error {error:.4f}"
    print(f"{what}: mIoU {scores.mean():.4f} +- {scores.std() / len(scores) ** 0.5:.4f}{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000, help="of the training with cross-entropy")
    parser.add_argument("--output", type=Path, help="a sheet: pictures, true maps, a sample, the majority, the U-Net")
    given = parser.parse_args()
    from latentdiff import LatentDiffusionPipeline

    lines = (given.folder / "test" / "metadata.jsonl").read_text().splitlines()[: given.pictures]
    names = [json.loads(line)["file_name"] for line in lines]
    pictures, true = (
        read(given.folder / "test", names),
        classes_of(read(given.folder / "test-maps", names, Image.Resampling.BOX)),
    )
    pipe = LatentDiffusionPipeline.from_pretrained(given.model, device="cpu")
    options = {"num_images_per_prompt": given.samples, "seed": 0, "output_type": "uint8"}
    canvas = np.stack([pipe("the map of a picture", image=picture, **options).images for picture in pictures])
    samples = classes_of(canvas)
    votes = (samples[..., None] == np.arange(len(COLORS))).mean(1)
    majority = votes.argmax(-1)
    say("a sample", np.mean([overlaps(samples[:, i], true) for i in range(given.samples)], 0))
    say(f"the majority of {given.samples}", overlaps(majority, true), calibration(votes.max(-1), majority == true))
    own = sorted(path.name for path in (given.folder / "train").glob("*.png"))
    train = read(given.folder / "train", own), classes_of(read(given.folder / "maps", own, Image.Resampling.BOX))
    network = by_cross_entropy(*train, given.steps)
    with torch.no_grad():
        chances = torch.cat([network(as_values(part), 0).sample.softmax(1) for part in np.array_split(pictures, 8)])
    likely, best = (each.numpy() for each in chances.max(1))
    say("a U-Net by cross-entropy", overlaps(best, true), calibration(likely, best == true))
    if given.output is not None:
        rows = [pictures, COLORS[true], canvas[:, 0], COLORS[majority], COLORS[best]]
        sheet = np.concatenate([np.concatenate(list(row[:12]), 1) for row in rows])
        Image.fromarray(sheet.astype(np.uint8)).save(given.output)


if __name__ == "__main__":
    main()
