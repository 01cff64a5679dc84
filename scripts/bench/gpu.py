"""Steps a second of a guided U-Net, ours beside diffusers', on random weights of Stable Diffusion's shapes.

    python scripts/bench/gpu.py [--family 1.5 XL] [--batch 1 8] [--kinds ...] [--runs 5] [--device cuda]

Each way draws in a process of its own (see peers.py), with few steps and with many: the difference is steps alone,
without text and decoder; a step is of twice the batch, with the text and without. Printed: steps a second, medians of
pairs that take turns; the operations in them as a share of what a product of large matrices reached just before; the
seconds of the first picture beyond a later one, which are compiling; how far pictures are from the first way's, of 255.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peers import KINDS, Peer

WAYS = ("diffusers-bfloat16", "diffusers-best", "torch-fast-bfloat16", "torch-max")
FEW, MANY = 5, 25  # which divide the 1000 times: of others diffusers steps from other levels than it reached
UNETS = {
    "1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "XL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
UNETS["small"] = UNETS["1.5"] | {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8}


def written(family, folder):
    """A model of that shape with random weights, as diffusers writes it; its text encoders have two layers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from latentdiff.networks.encoders.clip import clip_tokenizer

    def text(kind, width):
        shape = {"hidden_size": width, "projection_dim": width, "num_attention_heads": width // 64}
        return kind(CLIPTextConfig(vocab_size=49408, num_hidden_layers=2, eos_token_id=49407, **shape))

    channels = (32, 32, 64, 64) if family == "small" else (128, 256, 512, 512)
    parts = {
        "unet": unet(family),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
            scaling_factor=0.13025 if family == "XL" else 0.18215,
        ),
        "text_encoder": text(CLIPTextModel, 768),
        "tokenizer": clip_tokenizer(77),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            timestep_spacing="trailing",
        ),
    }
    if family == "XL":
        more = {"text_encoder_2": text(CLIPTextModelWithProjection, 1280), "tokenizer_2": clip_tokenizer(77, pad="!")}
        made = StableDiffusionXLPipeline(**parts, **more, add_watermarker=False)
    else:
        made = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.to(dtype=torch.bfloat16).save_pretrained(folder)


def unet(family):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNETS[family])


def operations(family):
    """Of the U-Net for one row, products and sums, counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = unet(family)
        side, width = network.config.sample_size, network.config.cross_attention_dim
        conditions = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)} if family == "XL" else None
        network(torch.zeros(1, 4, side, side), 1, torch.zeros(1, 77, width), added_cond_kwargs=conditions)
    return counter.get_total_flops()


def peak(device):
    """Operations a second of a product of bfloat16 matrices, the best of many."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


class Way:
    """One way of drawing: its pairs of few and many steps, and what its first picture took."""

    def __init__(self, kind, model, options, device):
        self.peer, self._options, self.pairs = Peer(kind, model, device), options, []
        first = self._seconds(FEW)
        self.compiling = first - self._seconds(FEW)
        self.pictures = np.load(options["out"])

    def _seconds(self, steps):
        answer = self.peer.draw(**self._options, steps=steps)
        self.memory = answer["memory"]
        return answer["seconds"]

    def run(self):
        self.pairs.append((self._seconds(MANY) - self._seconds(FEW)) / (MANY - FEW))


def compare(family, batch, arguments, model, folder):
    from latentdiff.diffusion.noise import normal

    side = UNETS[family]["sample_size"]
    np.save(folder / "latents.npy", normal((batch, 4, side, side), 1, "bench"))
    options = {"prompt": "a red circle", "guidance": 5.0, "height": 8 * side, "width": 8 * side}
    options |= {"latents": str(folder / "latents.npy"), "out": str(folder / "pictures.npy")}
    fastest, work = peak(arguments.device), 2 * batch * operations(family)
    print(f"{family}, {8 * side} pixels, batch {batch}: {work / 1e12:.2f} TFLOP a step, a peak of {fastest / 1e12:.1f}")
    ways = {kind: Way(kind, model, options, arguments.device) for kind in arguments.kinds}
    for _ in range(arguments.runs):
        for way in ways.values():
            way.run()
    first = next(iter(ways.values()))
    for kind, way in ways.items():
        speed = 1 / statistics.median(way.pairs)
        ratio = statistics.median(a / b for a, b in zip(first.pairs, way.pairs, strict=True))
        apart = 255 * np.abs(way.pictures - first.pictures).mean()
        print(
            f"  {kind:<20} {speed:8.2f} steps/s  {ratio:5.2f} times the first  {speed * work / fastest:6.1%} of it"
            f"  compiling {way.compiling:6.1f} s  {way.memory:6.0f} MB  {apart:.3f} from it",
            flush=True,
        )
        way.peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=UNETS, default=["1.5", "XL"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=WAYS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    for family in arguments.family:
        with tempfile.TemporaryDirectory() as folder:
            written(family, Path(folder) / "model")
            for batch in arguments.batch:
                compare(family, batch, arguments, Path(folder) / "model", Path(folder))


if __name__ == "__main__":
    main()
