"""Record what the project computes, as hashes, and compare two records: a refactoring must change no number.

    python scripts/equal.py before.json                       # on the commit before
    python scripts/equal.py after.json --against before.json  # on the commit after: prints every difference

A record holds a sha256 of the pixels of every picture, of the tensors of every file that a short training leaves, and
of the figures of a small evaluation. It is equal to the bit only on the same machine, with the same number of threads
and the same versions of the libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from latentdiff import LatentDiffusionPipeline  # noqa: E402
from latentdiff.families.loading import located  # noqa: E402
from tests import pictures, stable_diffusion  # noqa: E402

Record = dict[str, str]
SEEN: dict[str, np.ndarray] = {}  # the arrays behind the hashes of pictures, by hash, so that a difference has a size
PROMPT = "a red circle above a blue square"
SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun_exponential", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")
# Settings that name one method: DDIM is Euler's method in sigma / alpha, DDPM is DDIM with eta = 1.
SAME = ({"plain", "ddim", "euler"}, {"ddpm", "euler_ancestral"})
WAYS: dict[str, dict[str, Any]] = {  # of asking the default model
    "plain": {},
    "three": {"num_images_per_prompt": 3},
    "negative": {"negative_prompt": "a green star"},
    "weighted": {"prompt": "a (red:1.4) circle above a [blue] square"},
    "long": {"prompt": "a red circle above a blue square, " * 8},
    "several prompts": {"prompt": ["a cyan star", "two pink rings", "four blue triangles"]},
    "no guidance": {"guidance_scale": 1.0},
    "rescaled": {"guidance_rescale": 0.7, "guidance_scale": 5.0},
    "interval": {"guidance_interval": (-3.0, 1.0)},
    "threshold": {"threshold": 0.95, "guidance_scale": 6.0},
    "apg": {"apg": True, "apg_eta": 0.3, "apg_norm": 5.0, "apg_momentum": -0.5, "guidance_scale": 5.0},
    "cached features": {"cache_interval": 2},
    "larger": {"height": 96, "width": 128},
    "hires": {"hires_scale": 1.5},
    "variation": {"variation_seed": 5, "variation_strength": 0.3},
    "leading": {"spacing": "leading"},
    "linspace": {"spacing": "linspace"},
    "karras": {"spacing": "karras"},
    "exponential": {"spacing": "exponential"},
    "eta": {"sampler": "ddim", "eta": 0.6},
    "clip skip": {"clip_skip": 1},
    "slices": {"vae_slicing": True, "num_images_per_prompt": 2},
}
TORCH_WAYS: dict[str, dict[str, Any]] = {  # what only torch has
    "perturbed attention": {"pag_scale": 2.0},
    "by CLIP": {"clip_guidance_scale": 3.0},
    "tiles": {"vae_tiling": True, "width": 576},  # wider than a tile
}


def hash_of(array: Any) -> str:
    """sha256 of an array's shape, type and bytes."""
    values = np.ascontiguousarray(array.detach().cpu().float().numpy() if isinstance(array, torch.Tensor) else array)
    result = hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes()).hexdigest()
    SEEN[result] = values
    return result


def pixels_of(images: Any) -> str:
    """Of PIL images, all together."""
    return hash_of(np.stack([np.asarray(image) for image in images]))


def photo(side: int) -> tuple[Image.Image, Image.Image]:
    """A picture and a mask whose right half is white."""
    rng = np.random.default_rng(3)
    corners = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 :, side // 2 :] = 255
    return corners.resize((side, side), Image.Resampling.BICUBIC), Image.fromarray(mask)


def ways_with_picture(side: int) -> dict[str, dict[str, Any]]:
    """Ways of asking with a picture."""
    picture, mask = photo(side)
    return {
        "picture": {"image": picture, "strength": 0.6},
        "mask": {"image": picture, "mask_image": mask},
        "soft mask": {"image": picture, "mask_image": mask, "strength": 0.7},
        "outpaint": {"image": picture, "outpaint": (8, 0, 8, 16)},
    }


def ask(pipe: LatentDiffusionPipeline, way: dict[str, Any], **more: Any) -> str:
    """The hash of what a call draws."""
    return pixels_of(pipe(**{"prompt": PROMPT, "seed": 7, "num_inference_steps": 6, **more, **way}).images)


def weaker(folder: Path) -> Path:
    """scenes-64 with noise in the weights of its U-Net."""
    shutil.copytree(located("scenes-64").path, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    noisy = {name: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file({name: w.to(weights[name].dtype) for name, w in noisy.items()}, file, {"format": "pt"})
    return folder


def small_model(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """scenes-64 in both runtimes."""
    kinds: dict[str, dict[str, Any]] = {
        "openvino": {"runtime": "openvino"},
        "openvino float32": {"runtime": "openvino", "speed": "exact"},
        "torch": {"runtime": "torch", "device": "cpu"},
    }
    for kind, settings in kinds.items():
        pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", **settings)
        ways = {**WAYS, **ways_with_picture(64)}
        ways |= {sampler: {"sampler": sampler} for sampler in SAMPLERS}
        ways |= TORCH_WAYS if kind == "torch" else {}
        for name, way in ways.items():
            yield f"picture: scenes-64, {kind}, {name}", lambda pipe=pipe, way=way: ask(pipe, way)
        yield (
            f"picture: scenes-64, {kind}, latents",
            lambda pipe=pipe: hash_of(pipe(PROMPT, seed=7, num_inference_steps=6, output_type="latent").images),
        )
    guided = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
    guided.load_weaker(weaker(folder / "weaker"))
    yield "picture: scenes-64, torch, autoguidance", lambda: ask(guided, {"autoguidance_scale": 2.0})
    generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
    own = {"generator": generators, "num_images_per_prompt": 2, "sampler": "euler_ancestral"}
    yield "picture: scenes-64, torch, generators", lambda: ask(guided, own)
    settings = {"runtime": "torch", "device": "cpu", "torch_dtype": torch.bfloat16}
    fast = LatentDiffusionPipeline.from_pretrained("scenes-64", **settings)
    yield "picture: scenes-64, torch, bfloat16", lambda: ask(fast, {})


def stable_diffusions(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Tiny Stable Diffusion 1, 2, XL and inpainting, as folders and single files, with adapters and words."""
    for family in (*stable_diffusion.FAMILIES, "inpainting"):
        place = folder / f"sd-{family}"
        if family == "inpainting":
            stable_diffusion.pipeline("1", inpainting=True).save_pretrained(place)
        else:
            stable_diffusion.pipeline(family).save_pretrained(place)
        pipe = stable_diffusion.load(place)
        size = {"height": 64, "width": 64, "num_inference_steps": 3}
        for name, way in {"text": {}, "clip skip": {"clip_skip": 1}, **ways_with_picture(64)}.items():
            yield (
                f"picture: Stable Diffusion {family}, {name}",
                lambda pipe=pipe, way=way, size=size: ask(pipe, way, **size),
            )
    adapter, word = _adapter(folder), _word(folder)
    for name, fuse in (("merged", True), ("live", False)):
        pipe = stable_diffusion.load(folder / "sd-1")
        pipe.load_lora_weights(adapter, "made", weight=0.7, fuse=fuse)
        yield f"picture: LoRA, {name}", lambda pipe=pipe: ask(pipe, {}, height=64, width=64, num_inference_steps=3)
    pipe = stable_diffusion.load(folder / "sd-1")
    pipe.load_textual_inversion(word, "<new>")
    yield (
        "picture: textual inversion",
        lambda: ask(pipe, {"prompt": "a <new> castle"}, height=64, width=64, num_inference_steps=3),
    )


def _adapter(folder: Path) -> Path:
    """A LoRA of the tiny Stable Diffusion 1 in PEFT's names, of alpha = rank = 4."""
    made = stable_diffusion.pipeline("1")
    generator, state = torch.Generator().manual_seed(0), {}
    for part, network in (("unet", made.unet), ("text_encoder", made.text_encoder)):
        for name, layer in network.named_modules():
            if name.endswith((".to_q", ".to_v", ".q_proj", ".fc1")):
                rows, columns = layer.weight.shape
                state[f"{part}.{name}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=generator)
                state[f"{part}.{name}.lora_B.weight"] = 0.2 * torch.randn(rows, 4, generator=generator)
    save_file(state, folder / "made.safetensors")
    return folder / "made.safetensors"


def _word(folder: Path) -> Path:
    save_file({"<new>": torch.randn(2, 64, generator=torch.Generator().manual_seed(1))}, folder / "word.safetensors")
    return folder / "word.safetensors"


SHORT = (
    "data.count=40",
    "autoencoder.training.max_train_steps=6",
    "clip.training.max_train_steps=4",
    "clip.training.train_batch_size=8",
    "denoiser.training.max_train_steps=7",
    "denoiser.training.gradient_accumulation_steps=2",
    "denoiser.preview_pictures=8",
    "recommended.num_inference_steps=2",
)
OWN = ("clip.max_length=16", "data.pictures.validation_pictures=4", "denoiser.training.train_batch_size=4")
TRAININGS: dict[str, tuple[bool, tuple[str, ...]]] = {  # on pictures of a folder or on scenes, with which settings
    "scenes": (False, ()),
    "scenes, no cache, text encoder tuned": (
        False,
        ("denoiser.cache=false", "denoiser.tune_text_encoder=true", "denoiser.pooled_text=true"),
    ),
    "scenes, epsilon, min-SNR, offset, muon": (
        False,
        (
            "denoiser.prediction=epsilon",
            "denoiser.weighting=min_snr",
            "denoiser.noise_offset=0.05",
            "denoiser.input_perturbation=0.1",
            "denoiser.training.optimizer=muon",
            "denoiser.training.ema=power",
            "denoiser.schedule.zero_terminal_snr=false",
        ),
    ),
    "pictures in buckets": (
        True,
        (*OWN, "image_size=32", "data.pictures.bucket_step=8", "denoiser.training.num_workers=1"),
    ),
    "pictures, random crops, grey pixels": (
        True,
        (
            *OWN,
            "image_size=32",
            "data.grey=true",
            "autoencoder.kind=identity",
            "denoiser.cache=false",
            "data.pictures.crop=random",
            "data.pictures.flip=true",
        ),
    ),
}
TUNINGS: dict[str, tuple[str, ...]] = {
    "full": ("--method", "full", "--train-text-encoder"),
    "lora": ("--method", "lora", "--rank", "4", "--kohya", "--train-text-encoder"),
    "dora": ("--method", "lora", "--rank", "4", "--dora", "--snr-gamma", "5"),
    "dreambooth": (
        *("--method", "dreambooth", "--class-prompt", "a ring", "--num-class-images", "4"),
        *("--instance-prompt", "a zwx ring", "--set", "data.pictures.layout=uncaptioned"),
    ),
    "textual inversion": ("--method", "textual-inversion", "--token", "<zwx>", "--initial", "ring"),
}


def run(*words: Any, cwd: Path) -> None:
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "latentdiff", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr[-2000:]}")


def tensors_in(folder: Path) -> Record:
    """One hash for each safetensors file, of its tensors in the order of their names."""
    result = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if "cache" in file.relative_to(folder).parts:  # files of a cache are called by their own hash
            continue
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        result[file.relative_to(folder).as_posix()] = digest.hexdigest()
    return result


def trainings(folder: Path) -> Record:
    """Every tensor at the end of short trainings, of stages and of every method of fine-tuning."""
    record: Record = {}
    config = ROOT / "configs" / "scenes-tiny.toml"
    data = pictures.as_jsonl(folder / "pictures", pictures.some_pictures(24))
    for number, (name, (own, changes)) in enumerate(TRAININGS.items()):
        run_folder = folder / f"run-{number}"
        sets = [word for change in (*SHORT, *changes) for word in ("--set", change)]
        run("train", config, "-o", run_folder, *sets, *(("--data", data) if own else ()), cwd=folder)
        record |= {f"training: {name}: {file}": value for file, value in tensors_in(run_folder).items()}
    quick = ("data.kind=scenes", "autoencoder.training.max_train_steps=5", "autoencoder.training.train_batch_size=8")
    tiny = [word for change in quick for word in ("--set", change)]
    run("train", ROOT / "configs" / "tiny-vae.toml", "--stage", "autoencoder", "-o", folder / "tiny", *tiny, cwd=folder)
    record |= {f"training: tiny VAE: {file}": value for file, value in tensors_in(folder / "tiny").items()}
    steps = ("--max-train-steps", "4", "--train-batch-size", "2", "--set", "previews.num_inference_steps=2")
    for name, words in TUNINGS.items():
        place = folder / f"tuning-{name.replace(' ', '-')}"
        run("finetune", folder / "run-0" / "model", data, "-o", place, *steps, *words, cwd=folder)
        record |= {f"fine-tuning: {name}: {file}": value for file, value in tensors_in(place).items()}
    return record


def commands(folder: Path) -> Record:
    """Pictures of a prompts file, of the tiny VAE that was trained before, and the figures of an evaluation."""
    record: Record = {}
    lines = [{"prompt": PROMPT, "seed": 1}, {"prompt": "a cyan star", "num_inference_steps": 4, "sampler": "unipc"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("generate", "--prompts-file", "prompts.jsonl", "-s", 3, "-N", 2, "-o", "drawn", cwd=folder)
    for file in sorted((folder / "drawn").glob("*.png")):
        record[f"picture: prompts file, {file.name}"] = hash_of(np.asarray(Image.open(file)))
    run("generate", PROMPT, "-s", 3, "--vae", folder / "tiny" / "model" / "vae", "-o", "small.png", cwd=folder)
    record["picture: tiny VAE"] = hash_of(np.asarray(Image.open(folder / "small.png")))
    only = "likelihood,distances,composition,autoencoder,diversity"
    run("evaluate", "--pictures", 48, "--only", only, "--runtime", "torch", "-o", "report", cwd=folder)
    tree = json.loads((folder / "report" / "metrics.json").read_text())
    for section, content in tree["models"][0]["sections"].items():
        for name, figure in content["figures"].items():
            record[f"evaluation: {section}: {name}"] = json.dumps([figure["value"], figure["error"]])
    return record


def recorded(kind: str) -> Record:
    """One half of all: pictures, or trainings."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if kind == "trainings":
            return trainings(folder) | commands(folder)
        return {name: draw() for cases in (small_model(folder), stable_diffusions(folder)) for name, draw in cases}


def differences(before: Record, after: Record, known: dict[str, np.ndarray]) -> list[str]:
    """A line for each entry that differs, with by how much where that is known, and for each that is new or missing."""
    changed = [name for name in before if name in after and before[name] != after[name]]
    lines = [f"differs: {name}{_size(before[name], after[name], known)}" for name in changed]
    lines += [f"missing: {name}" for name in before if name not in after]
    return lines + [f"new: {name}" for name in after if name not in before]


def _size(before: str, after: str, known: dict[str, np.ndarray]) -> str:
    """The largest and the mean difference of two pictures, or the relative one of two figures."""
    if before.startswith("["):
        (old, _), (new, _) = json.loads(before), json.loads(after)
        return f" ({old} -> {new})"
    if before not in known or after not in known or known[before].shape != known[after].shape:
        return ""
    apart = np.abs(known[before].astype(float) - known[after].astype(float))
    return f" (by at most {apart.max():.3g}, {apart.mean():.2g} on average)"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier record")
    parser.add_argument("--only", choices=("pictures", "trainings"), help="half of it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    record = {kind: recorded(kind) for kind in ([options.only] if options.only else ["pictures", "trainings"])}
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    np.savez_compressed(options.record.with_suffix(".npz"), **SEEN)
    print("; ".join(f"{len(entries)} entries of {kind}" for kind, entries in record.items()))
    if options.against:
        before = json.loads(options.against.read_text())
        if not before.keys() <= {"pictures", "trainings"}:
            raise SystemExit(f"{options.against} is a record of another version of this script: make it again")
        with np.load(options.against.with_suffix(".npz")) as arrays:
            known = {**arrays, **SEEN}
        lines = [line for kind, half in record.items() for line in differences(before.get(kind, {}), half, known)]
        print("\n".join(lines) or "all entries are equal")
        raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
