"""What a step of training costs for U-Nets of other shapes, before one is chosen: samples a second, and the optimizer.

    python scripts/bench/unets.py configs/emoji-128.toml 64,128,192:011 48,112,192:001 32,112,160,224:0011

A shape is the channels of its levels, and 1 for each level that attends to the text. All else is the config's. `--set`
overrides it, for example autoencoder.latent_channels. Random latents and texts of the longest length go forward and
backward; the text encoder is not counted. Printed are medians of `--runs` runs in turn, after one that is not counted.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from latentdiff.families.own import new_unet
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.conditions import Conditions
from latentdiff.settings.config import Config, load_config
from latentdiff.training.optim import optimizer_of


def config_of(path: Path, shape: str, changes: list[str]) -> Config:
    channels, _, attention = shape.partition(":")
    own = {
        "denoiser.block_out_channels": [int(number) for number in channels.split(",")],
        "denoiser.attention": [mark == "1" for mark in attention],
    }
    return load_config(path, [*changes, *own.items()])


def seconds_of(unet: UNet, optimizer: torch.optim.Optimizer, config: Config, shape: tuple[int, ...]) -> list[float]:
    """Of the forward and backward pass, and of the optimizer's step."""
    x, times = torch.randn(shape), torch.rand(shape[0]) * 1000
    clip, began = config.clip, time.perf_counter()
    texts = {"tokens": torch.randn(shape[0], clip.max_length, clip.text_width)}
    if config.denoiser.pooled_text:
        texts["pooled"] = torch.randn(shape[0], clip.text_width)
    unet(x, times, Conditions(texts)).square().mean().backward()
    done = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    return [done - began, time.perf_counter() - done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    cases = []
    for shape in options.shapes:
        config = config_of(options.config, shape, options.changes)
        levels = len(config.autoencoder.block_out_channels)
        channels, side = config.autoencoder.latent_channels, config.image_size // 2 ** (levels - 1)
        unet = new_unet(config, channels, side).train().to(memory_format=torch.channels_last)
        size = (config.denoiser.training.train_batch_size, channels, side, side)
        cases.append((unet, optimizer_of(unet, config.denoiser.training), config, size))
    runs = [[seconds_of(*case) for case in cases] for _ in range(1 + options.runs)][1:]
    print("| shape | million weights | samples a second | optimizer, seconds a step |\n|---|---|---|---|")
    for number, (shape, case) in enumerate(zip(options.shapes, cases, strict=True)):
        passes, step = (statistics.median(run[number][part] for run in runs) for part in (0, 1))
        weights = sum(p.numel() for p in case[0].parameters()) / 1e6
        print(f"| {shape} | {weights:.1f} | {case[3][0] / passes:.0f} | {step:.2f} |")


if __name__ == "__main__":
    main()
