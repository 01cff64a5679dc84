"""`latentdiff generate`: a prompt becomes pictures on disk."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli.output import check_writable, write_new

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline, Output
    from latentdiff.request import Request


def generate(
    prompt: Annotated[str, typer.Argument(help='What to draw; "-" reads it from standard input.')],
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "-n", help="What not to draw.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A model folder (default: scenes-64).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (default: the model's).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none.")
    ] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="Pull back to the unguided contrast, 0 to 1.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, dpmpp_2m, unipc, ... (default: the model's).")] = None,
    spacing: Annotated[str | None, typer.Option(help="trailing, leading, linspace, karras or uniform.")] = None,
    eta: Annotated[float | None, typer.Option(help="Noise added by ddim, 0 to 1.")] = None,
    width: Annotated[int | None, typer.Option("--width", "-W", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", "-H", help="Pixels.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Picture i has SEED + i (default: random).")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-N", help="How many pictures.")] = 1,
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn at once.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder, or a .png file for one picture.")] = Path(
        "outputs"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    metadata: Annotated[bool, typer.Option(help="Write how it was made into each PNG.")] = True,
) -> None:
    """Draw pictures of a prompt. Paths go to standard output, progress to standard error."""
    from latentdiff.pretrained import default_model
    from latentdiff.request import request

    given = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "sampler": sampler,
        "spacing": spacing,
        "eta": eta,
        "width": width,
        "height": height,
        "seed": seed,
        "num_images": num_images,
        "batch_size": batch_size,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    text = _standard_input() if prompt == "-" else prompt
    asked = request(prompt=text, **settings)  # refused here before any library or weight is loaded
    target = _target(output, asked.num_images)
    folder = default_model() if model is None else model
    _check_sizes(folder, asked)
    pipe = _load(folder, device, dtype)
    asked = pipe.request(text, **settings)
    _warn(pipe, asked)
    for path in _drawn(pipe, asked, target, metadata):
        typer.echo(path)


def _standard_input() -> str:
    from latentdiff.errors import ConfigError

    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise ConfigError("prompt: standard input is not text in UTF-8") from None


def _target(output: Path, num_images: int) -> Path:
    """The output checked before any work: a folder that can be written to, or a new .png file for a single picture.

    Nothing is created yet.
    """
    from latentdiff.errors import ConfigError

    suffix = output.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ConfigError(f"pictures are written as .png ({output})")
    if suffix == ".png" and num_images > 1:
        raise ConfigError(f"{num_images} pictures do not go into one file ({output}). Name a folder")
    folder = output.parent if suffix == ".png" else output
    check_writable(output, folder)
    if suffix == ".png" and os.path.lexists(output):
        raise ConfigError(f"file exists ({output}). Pictures are never overwritten")
    return output


def _check_sizes(model: Path, asked: Request) -> None:
    """Sizes the model cannot draw are refused from its configs, before its weights are read."""
    from latentdiff.models.folder import check_folder, picture_geometry
    from latentdiff.request import SIDES, check_size

    if asked.width is None and asked.height is None:
        return  # its own size; the folder is checked when it is loaded
    check_folder(model)
    multiple, (height, width) = picture_geometry(model)
    lowest = min(*SIDES, height, width)
    for name, side in (("width", asked.width), ("height", asked.height)):
        if side is not None:
            check_size(name, side, multiple, lowest)


def _load(model: Path, device: str | None, dtype: str) -> LatentDiffusionPipeline:
    from latentdiff.errors import ConfigError

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"unknown dtype {dtype!r}; one of float32, bfloat16, float16")
    import torch

    from latentdiff.pipeline import LatentDiffusionPipeline

    return LatentDiffusionPipeline.from_pretrained(model, device=device, torch_dtype=getattr(torch, dtype))


def _warn(pipe: LatentDiffusionPipeline, asked: Request) -> None:
    """Say what of the request will have no effect."""
    if asked.negative_prompt and asked.guidance_scale <= 1:
        print("warning: the negative prompt has no effect without guidance (--cfg over 1)", file=sys.stderr)
    for name in ("prompt", "negative_prompt"):
        count, limit = pipe.text_encoder.count_tokens(getattr(asked, name)), pipe.text_encoder.max_length
        if count > limit:
            print(f"warning: {name} has {count} tokens and is cut to the model's {limit}", file=sys.stderr)


def _drawn(pipe: LatentDiffusionPipeline, asked: Request, target: Path, metadata: bool) -> Any:
    """Draw batch by batch under a progress bar and yield the path of every picture written."""
    from tqdm import tqdm

    from latentdiff.pipeline import jobs_of

    jobs = jobs_of(asked)
    batches = -(-len(jobs) // asked.batch_size)
    with tqdm(total=batches * asked.num_inference_steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, len(jobs), asked.batch_size):
            batch = jobs[first : first + asked.batch_size]
            for step in pipe.steps(batch):
                bar.update()
                latents = step.x
            yield from _written(pipe.finish(batch, latents), target, metadata)


def _written(output: Output, target: Path, metadata: bool) -> Any:
    from latentdiff.metadata import png_info

    for image, record in zip(output.images, output.metadata, strict=True):
        path = target if target.suffix.lower() == ".png" else _next_path(target, record.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        image.save(encoded, "PNG", pnginfo=png_info(record) if metadata else None)
        write_new(path, encoded.getvalue())
        yield path


def _next_path(folder: Path, seed: int) -> Path:
    """folder/NNNNN-SEED.png with the first number after all that are there."""
    names = (re.match(r"(\d{5,9})-.*\.png$", path.name) for path in folder.glob("*.png"))
    numbers = [int(name[1]) for name in names if name]
    return folder / f"{max(numbers, default=0) + 1:05d}-{seed}.png"
