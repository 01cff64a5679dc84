"""Reading captioned pictures: our loader beside Hugging Face's, what a cache costs to fill and to read back.

The peer is the input pipeline of diffusers' train_text_to_image.py: `load_dataset("imagefolder")`, torchvision's resize
(Lanczos), centre crop and normalisation in a transform of the set, the tokenizer, a shuffling DataLoader. Each variant
reads one epoch after a short warm-up, in a process of its own, in turn.

    python scripts/bench/data.py FOLDER --runs 3
    python scripts/bench/data.py FOLDER --rows 100000      # the cache alone, of so many synthetic rows
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 64
VARIANTS = ("datasets, 0 workers", "latentdiff, 0 workers", "datasets, 2 workers", "latentdiff, 2 workers")


def tokenizer():
    from latentdiff.networks.encoders.clip import clip_tokenizer

    return clip_tokenizer(77)


def peer(folder: Path, side: int, workers: int):
    """An epoch of batches, as diffusers' script makes them; returns how many pictures there are."""
    import torch
    from datasets import load_dataset
    from torchvision import transforms

    words = tokenizer()
    lanczos = transforms.InterpolationMode.LANCZOS
    steps = [transforms.Resize(side, interpolation=lanczos), transforms.CenterCrop(side), transforms.ToTensor()]
    pixels = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

    def preprocess(examples):
        examples["pixel_values"] = [pixels(image.convert("RGB")) for image in examples["image"]]
        ids = words(examples["text"], max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        examples["input_ids"] = ids.input_ids
        return examples

    def collate(rows):
        images = torch.stack([row["pixel_values"] for row in rows]).to(memory_format=torch.contiguous_format).float()
        return {"pixel_values": images, "input_ids": torch.stack([row["input_ids"] for row in rows])}

    table = load_dataset("imagefolder", data_dir=str(folder), split="train").with_transform(preprocess)
    loader = torch.utils.data.DataLoader(
        table, shuffle=True, collate_fn=collate, batch_size=BATCH, num_workers=workers, drop_last=True
    )
    return len(table), iter(loader)


def ours(folder: Path, side: int, workers: int):
    """The same by our stage's own parts."""
    import torch

    from latentdiff.data.dataset import open_data
    from latentdiff.networks.codecs.identity import IdentityCodec
    from latentdiff.settings.config import parse_config
    from latentdiff.stages.cache import EncodedLatents
    from latentdiff.training.loader import batches_of
    from latentdiff.training.order import Order

    data = {"kind": "pictures", "pictures": {"source": str(folder)}}
    examples = open_data(parse_config({"image_size": side, "data": data})).training
    order, words = Order(0, "bench", [*examples.pictures.buckets().values()]), tokenizer()
    latents = EncodedLatents(examples, IdentityCodec())

    def batch(positions: range):
        keys = [order.key(position) for position in positions]
        captions = [examples.caption(*key) for key in keys]
        ids = words(captions, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {**latents.batch(keys), "ids": ids}

    shares = (range(first, first + BATCH) for first in range(0, len(examples) // BATCH * BATCH, BATCH))
    return len(examples), batches_of(batch, shares, workers, torch.device("cpu"))


def epoch(variant: str, folder: Path, side: int) -> float:
    """Pictures a second of one epoch, the first three batches apart."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name, workers = variant.split(", ")
    _, batches = (peer if name == "datasets" else ours)(folder, side, int(workers.split()[0]))
    for _ in range(3):
        next(batches)
    began, count = time.perf_counter(), 0
    for made in batches:
        count += len(next(iter(made.values())))
    return count / (time.perf_counter() - began)


def filling(folder: Path, side: int, scratch: Path) -> None:
    """The default model's autoencoder over the whole folder into a cache, and a second start that finds it there."""
    from accelerate import Accelerator

    from latentdiff.data.dataset import open_data
    from latentdiff.families.loading import included_model
    from latentdiff.families.weights import load_codec
    from latentdiff.settings.config import parse_config
    from latentdiff.stages.cache import latents_of

    config = parse_config({"image_size": side, "data": {"kind": "pictures", "pictures": {"source": str(folder)}}})
    autoencoder, accelerator = load_codec(included_model()).float(), Accelerator(cpu=True)
    for what in ("encoded", "found again"):
        examples, began = open_data(config, scratch).training, time.perf_counter()
        latents_of(config.denoiser, [examples], autoencoder, scratch, accelerator)
        seconds = time.perf_counter() - began
        print(f"cache: {len(examples):,} pictures {what} in {seconds:.1f} s, {len(examples) / seconds:,.0f} a second")


def reading(rows: int, scratch: Path) -> None:
    """Synthetic rows of a 64-pixel model (4 x 8 x 8, two tensors of halves) written, opened, and read at random."""
    import numpy as np
    import torch

    from latentdiff.data.store import Store
    from latentdiff.stages.cache import ROWS_A_FILE

    def own() -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1e3

    keys = [f"{number:032x}" for number in range(rows)]
    store, began = Store(scratch), time.perf_counter()
    for first in range(0, rows, ROWS_A_FILE):
        some = keys[first : first + ROWS_A_FILE]
        values = torch.randn(2, len(some), 4, 8, 8).half()
        store.add(some, {"mean": values[0], "log_variance": values[1]})
    size = sum(path.stat().st_size for path in scratch.iterdir()) / 1e6
    print(f"cache: {rows:,} rows written at {rows / (time.perf_counter() - began):,.0f} a second, {size:.0f} MB")
    del store
    before, began = own(), time.perf_counter()
    store = Store(scratch)
    print(
        f"       opened, every byte hashed, in {time.perf_counter() - began:.2f} s, {own() - before:.0f} MB of memory"
    )
    order, began = np.random.default_rng(0).permutation(rows), time.perf_counter()
    for first in range(0, rows, BATCH):
        store.rows([keys[row] for row in order[first : first + BATCH]])
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"       read in random batches of {BATCH} at {rows / seconds:,.0f} rows a second; "
        f"{own() - before:.0f} MB of memory more than before, peak {peak:,.0f} MB with torch"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pictures with metadata.jsonl")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="of a synthetic cache, and nothing else")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        return print(json.dumps(epoch(arguments.variant, arguments.folder, arguments.side)))
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.rows:
            return reading(arguments.rows, Path(scratch))
        filling(arguments.folder, arguments.side, Path(scratch))
    result: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    for _ in range(arguments.runs):
        for variant in VARIANTS:
            words = [sys.executable, __file__, arguments.folder, "--side", str(arguments.side), "--variant", variant]
            done = subprocess.run(words, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            result[variant].append(json.loads(done.stdout.splitlines()[-1]))
    for variant, speeds in result.items():
        theirs = result[variant.replace("latentdiff", "datasets")]
        ratios = [own / other for own, other in zip(speeds, theirs, strict=True)]
        view = f"x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{variant:<24} {statistics.median(speeds):8,.0f} pictures/s  {view}")
    return None


if __name__ == "__main__":
    main()
