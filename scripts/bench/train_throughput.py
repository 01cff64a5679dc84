"""Training, pictures a second: diffusers' text-to-image fine-tuning flow beside ours, without and with caches.

    python scripts/bench/train_throughput.py [--model scenes|sd15] [--precision no|bf16] [--batch 16] [--runs 3]

Every run is a process of its own, in turn, on the same weights (configs/scenes-64.toml's after a step, or random ones
of Stable Diffusion 1.5's shape) and the same PNG files with captions, decoded as they are needed. The peer does what
diffusers' train_text_to_image.py does in every step, at its documented best: an image folder from `datasets` with
torchvision's transforms, a DataLoader, the VAE and the text encoder frozen in `--precision`, AdamW, gradient clipping,
--use_ema with --foreach_ema, the loss gathered and shown. Ours is the training loop as `latentdiff train` runs it,
with its average of weights. Steps are timed after a warm-up; printed are medians over runs, and ratios run by run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[2] / "configs" / "scenes-64.toml"
VARIANTS = ("diffusers", "ours", "ours, cached", "ours, cached, compiled")


def train_for_a_step(run: Path) -> None:
    """A model of the config in run/model."""
    words = [sys.executable, "-m", "latentdiff", "train", CONFIG, "-o", run]
    changes = ["data.count=64", "denoiser.preview_pictures=8", "recommended.num_inference_steps=1"]
    changes += [f"{stage}.training.max_train_steps=1" for stage in ("autoencoder", "clip", "denoiser")]
    subprocess.run([*words, *(word for change in changes for word in ("--set", change))], check=True)


def networks(model: str, folder: Path) -> tuple:
    """diffusers' and transformers' modules (VAE, text encoder, tokenizer, U-Net, scheduler), the same each time."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    if model == "scenes":
        made = folder / "run" / "model"
        return (
            AutoencoderKL.from_pretrained(made, subfolder="vae", torch_dtype=torch.float32),
            CLIPTextModel.from_pretrained(made, subfolder="text_encoder", dtype=torch.float32),
            CLIPTokenizer.from_pretrained(made, subfolder="tokenizer"),
            UNet2DConditionModel.from_pretrained(made, subfolder="unet", torch_dtype=torch.float32),
            DDPMScheduler.from_pretrained(made, subfolder="scheduler"),
        )
    from latentdiff.networks.encoders.clip import clip_tokenizer

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return vae, text, clip_tokenizer(77), unet, schedule


def draw_pictures(folder: Path, count: int, side: int) -> None:
    """PNG files and a metadata.jsonl with their captions."""
    from PIL import Image

    from latentdiff.data import scenes
    from latentdiff.diffusion import noise

    with (folder / "metadata.jsonl").open("w") as rows:
        for number in range(count):
            scene = scenes.scene(noise.generator(0, "bench", number))
            Image.fromarray(scenes.render(scene, side)).save(folder / f"{number:05d}.png")
            rows.write(json.dumps({"file_name": f"{number:05d}.png", "text": scene.caption}) + "\n")


def peer(model: str, folder: Path, side: int, batch: int, precision: str):
    """A generator of steps by the flow of diffusers' script."""
    import torch.nn.functional as F  # noqa: N812 - torch's own name for it
    from accelerate import Accelerator
    from datasets import load_dataset
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torchvision import transforms

    accelerator = Accelerator(mixed_precision=precision)
    vae, text_encoder, tokenizer, unet, scheduler = networks(model, folder.parent)
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    unet.train()
    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    prepare = transforms.Compose(
        [
            transforms.Resize(side, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def transformed(rows):
        ids = tokenizer(
            rows["text"],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"pixel_values": [prepare(image.convert("RGB")) for image in rows["image"]], "input_ids": list(ids)}

    dataset = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(folder.parent / "cache"))["train"]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]).contiguous().float(),
            "input_ids": torch.stack([row["input_ids"] for row in rows]),
        }

    loader = torch.utils.data.DataLoader(
        dataset.with_transform(transformed), shuffle=True, collate_fn=collate, batch_size=batch
    )
    rates = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=10_000)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    weight_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)
    ema.to(accelerator.device)
    while True:
        for rows in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(rows["pixel_values"].to(weight_dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                t = torch.randint(
                    0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
                ).long()
                noisy = scheduler.add_noise(latents, noise, t)
                context = text_encoder(rows["input_ids"], return_dict=False)[0]
                velocity = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(latents, noise, t) if velocity else noise
                predicted = unet(noisy, t, context, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                view = accelerator.gather(loss.repeat(batch)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            ema.step(unet.parameters())
            yield view, loss.detach().item(), rates.get_last_lr()[0]


def ours(model: str, folder: Path, side: int, batch: int, precision: str, cached: bool, compiled: bool):
    """A generator of steps by our loop."""
    from accelerate import Accelerator

    from latentdiff.data.dataset import open_data
    from latentdiff.diffusion.objective import DiffusionLoss
    from latentdiff.diffusion.path import VariancePreserving
    from latentdiff.diffusion.times import Times
    from latentdiff.families.own import laid_out_for
    from latentdiff.networks.backbones.unet import UNet
    from latentdiff.networks.codecs.kl import KLAutoencoder
    from latentdiff.networks.encoders.clip import TextEncoder
    from latentdiff.runtime.memory import keep_freed_memory
    from latentdiff.settings.config import Training, parse_config
    from latentdiff.stages.cache import captions_of, latents_of
    from latentdiff.training.denoiser import DenoiserStage, Draws, Samples
    from latentdiff.training.ema import Ema, constant_decay
    from latentdiff.training.loop import Batching, Optimisation, train_steps
    from latentdiff.training.optim import optimizer_of
    from latentdiff.training.order import Order

    accelerator = Accelerator(mixed_precision=precision)
    vae, text, tokenizer, network, scheduler = networks(model, folder.parent)
    unet, autoencoder, text_encoder = UNet(network), KLAutoencoder(vae).eval(), TextEncoder(tokenizer, text).eval()
    keep_freed_memory()
    laid_out_for(unet, accelerator.device, narrow=accelerator.mixed_precision != "no")
    autoencoder.requires_grad_(False)
    if accelerator.device.type == "cpu":
        unet.use_plain_attention()
    data = {"kind": "pictures", "pictures": {"source": str(folder)}}
    config = parse_config({"image_size": side, "data": data, "denoiser": {"cache": cached}})
    examples, cache = open_data(config).training, folder.parent / "cache"
    (latents,) = latents_of(config.denoiser, [examples], autoencoder, cache, accelerator)
    (texts,) = captions_of(config.denoiser, [examples], text_encoder, cache, accelerator)
    if cached:
        del autoencoder, text_encoder, vae, text  # what is cached needs them no more
    schedule = VariancePreserving.scaled_linear()
    if scheduler.config.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()
    loss = DiffusionLoss(schedule, scheduler.config.prediction_type)
    draws = Draws(0, Times(schedule), caption_dropout=0.1)
    order = Order(0, "training", list(examples.pictures.buckets().values()))
    stage = DenoiserStage(unet, {"unet": unet}, loss, Samples(latents, texts, examples.pictures.name), draws, order)
    optimizer = optimizer_of(unet, Training(learning_rate=1e-4))
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    if compiled:
        prepared = torch.compile(prepared)
    optimisation = Optimisation(optimizer, Ema(unet, constant_decay(0.999)), lambda step: 1e-4, 1.0)
    return train_steps(accelerator, stage, prepared, optimisation, Batching(batch), range(10**6))


def run(arguments: argparse.Namespace) -> None:
    """One variant in this process; its median seconds a step and its memory as JSON."""
    settings = arguments.model, arguments.folder, arguments.side, arguments.batch, arguments.precision
    if arguments.variant == "diffusers":
        steps = peer(*settings)
    else:
        steps = ours(*settings, "cached" in arguments.variant, "compiled" in arguments.variant)
    times = [time.perf_counter()]
    for _ in range(arguments.warm_up + arguments.steps):
        next(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    seconds = statistics.median(b - a for a, b in pairwise(times[arguments.warm_up :]))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps({"seconds": seconds, "memory": memory}))


def measured(variant: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """What a process of its own says of a variant."""
    words = [sys.executable, __file__, "--variant", variant, "--folder", str(folder)]
    for name in ("model", "precision", "batch", "side", "steps", "warm_up"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("scenes", "sd15"), default="scenes")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also ours with torch.compile")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        return run(arguments)
    variants = VARIANTS if arguments.compiled else VARIANTS[:3]
    result: dict[str, list[dict]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        if arguments.model == "scenes":
            train_for_a_step(folder.parent / "run")
        draw_pictures(folder, max(64, 2 * arguments.batch), arguments.side)
        for _ in range(arguments.runs):
            for variant in variants:
                result[variant].append(measured(variant, arguments, folder))
    print(f"{arguments.model}, {arguments.side} px, batch {arguments.batch}, precision {arguments.precision}")
    for variant, figures in result.items():
        speeds = [arguments.batch / figure["seconds"] for figure in figures]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(figures, result["diffusers"], strict=True)]
        memory = statistics.median(figure["memory"] for figure in figures)
        print(
            f"{variant:<24} {statistics.median(speeds):7.2f} images/s  {memory:5.1f} GB  "
            f"x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return None


if __name__ == "__main__":
    main()
