"""`latentdiff generate`: pictures from prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.cli.batches import Process, Target, write_all
from latentdiff.cli.loading import (
    adapter_and_weight,
    common_settings,
    control_option,
    embedding_and_word,
    load_controls,
    load_extras,
    load_image_prompts,
    loaded,
    picture_and_scale,
)
from latentdiff.cli.options import OUTPUTS, Model, Precision, Runtime, Speed
from latentdiff.cli.prompts import PromptEntry, one_prompt, read_prompts
from latentdiff.cli.variations import grid_of, varied, write_grid
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.grids import GRIDS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.files import check_target, loses_pixels, open_picture, suffix_of

if TYPE_CHECKING:
    from latentdiff.drawing.batch import Job
    from latentdiff.drawing.hints import Hint
    from latentdiff.drawing.image_prompts import ImagePrompt
    from latentdiff.drawing.request import Request
    from latentdiff.pipeline import LatentDiffusionPipeline


class Format(StrEnum):
    """The format of pictures in a folder."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class Offload(StrEnum):
    """What moves to the device when it is needed."""

    model = "model"
    block = "block"
    sequential = "sequential"


def generate(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" reads it from standard input.')] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="For models of classes: the class to draw, in place of the prompt.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "-n", help="What not to draw.")] = None,
    model: Model = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id: commit, tag or branch.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a folder's weights: fp16, ...")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings of a distilled model or adapter: lcm, turbo, lightning, hyper, tcd, dmd2."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Draw in 4 steps without guidance, by the model's student of few steps.")
    ] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (default: the model's).")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none (default: the model's)."),
    ] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="Restore the unguided contrast, 0 to 1.")] = None,
    clip_guidance_scale: Annotated[
        float | None, typer.Option(help="Steer by the gradient of CLIP's score, about 3.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)} (default: the model's).")] = None,
    spacing: Annotated[str | None, typer.Option(help=f"{', '.join(GRIDS)} (default: the model's).")] = None,
    eta: Annotated[
        float | None, typer.Option(help="Noise that a stochastic sampler adds, 0 to 1 (default: the sampler's).")
    ] = None,
    width: Annotated[
        int | None, typer.Option("--width", "-W", help="Pixels (default: the model's, or the picture's).")
    ] = None,
    height: Annotated[
        int | None, typer.Option("--height", "-H", help="Pixels (default: the model's, or the picture's).")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Width and height, 512x768.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A picture to start from.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A mask of the image's size: white is redrawn, the rest stays.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="How much of the image is redrawn, up to 1 (default: 0.8; with a mask 1)."),
    ] = None,
    mask_blur: Annotated[float | None, typer.Option(help="Pixels by which the mask's edge is softened.")] = None,
    outpaint: Annotated[str | None, typer.Option(help="Pixels to add around the image: LEFT,TOP,RIGHT,BOTTOM.")] = None,
    hires_scale: Annotated[float | None, typer.Option(help="Draw, enlarge by this factor, redraw.")] = None,
    hires_strength: Annotated[
        float | None, typer.Option(help="How much of the enlarged picture is redrawn (default: 0.5).")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="An adapter and its weight, PATH:0.8; may be repeated.")
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="Learnt words (textual inversion), PATH or WORD=PATH; may be repeated.")
    ] = None,
    weaker: Annotated[str | None, typer.Option(help="A weaker model, for --set autoguidance_scale=2.")] = None,
    refiner: Annotated[
        str | None, typer.Option(help="A model that draws the last fifth of the levels (--set refiner_switch=0.8).")
    ] = None,
    cascade: Annotated[
        list[str] | None,
        typer.Option(help="A model that enlarges the picture; repeated, each enlarges the result of the one before."),
    ] = None,
    upscaler: Annotated[
        Path | None,
        typer.Option(help="An upscaler such as ESRGAN, for the picture or the input of --hires-scale."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="A ControlNet and the picture it reads, MODEL:PICTURE[:SCALE]; may be repeated."),
    ] = None,
    annotate: Annotated[
        str | None,
        typer.Option(help="Annotator that makes the control picture from the named one: canny, blur, grey, ..."),
    ] = None,
    ip_adapter: Annotated[
        list[Path] | None,
        typer.Option(help="An IP-Adapter, which shows the image prompts; may be repeated."),
    ] = None,
    image_prompt: Annotated[
        list[str] | None,
        typer.Option(help="A picture used as a prompt, PICTURE[:SCALE]; requires --ip-adapter; may be repeated."),
    ] = None,
    clip: Annotated[
        Path | None,
        typer.Option(help="CLIP in open_clip's format, for --clip-guidance-scale (default: the model's own)."),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="Another VAE for the same latents: a better one, or a tiny one, which is faster."),
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Number of the text encoder's last layers to leave out.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Picture i has SEED + i (default: random).")] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", "-N", help="Number of pictures of each prompt (default: 1).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures of a batch (default: 8).")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line, # for comments; .jsonl: objects with prompt, image, mask, outpaint, any setting."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, NAME=VALUE; see the manual.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Draw under each value of a setting, cfg=1,3,7; repeated, under every combination."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all pictures as one, with labels.")] = False,
    steps_gif: Annotated[
        bool, typer.Option("--steps-gif", help="Also write the way from noise to each picture, as a GIF.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder, or a file for a single picture.")] = OUTPUTS,
    picture_format: Annotated[
        Format | None, typer.Option("--format", help="Format of pictures in a folder (default: png).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of the arithmetic (default: float32; with openvino bfloat16, if the CPU has it)."),
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="auto: openvino on a CPU if the model has an export, otherwise torch.")
    ] = Runtime.auto,
    speed: Annotated[
        Speed | None,
        typer.Option(
            help="exact: unchanged; fast: compiled; max: also in 16 bits (default: exact; with openvino max)."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="Quantize the weights, for less memory (int4: openvino; fp8, q8_0, q4_0: torch)."
        ),
    ] = None,
    offload: Annotated[Offload | None, typer.Option(help="Keep the networks in the CPU's memory.")] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each picture instead of its path.")
    ] = False,
    metadata: Annotated[bool, typer.Option(help="Write into each picture how it was made.")] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with an interrupted command: existing pictures are skipped. Requires --seed."
        ),
    ] = False,
) -> None:
    """Draw pictures from prompts. Paths go to standard output, progress to standard error."""
    controls = [control_option(text) for text in control or []]
    scales = tuple(1.0 if entry.scale is None else entry.scale for entry in controls)
    prompt_pictures, adapters = [picture_and_scale(text) for text in image_prompt or []], ip_adapter or []
    options = {
        "ip_adapter_scale": _scales([scale for _, scale in prompt_pictures], len(adapters)),
        "controlnet_conditioning_scale": scales if any(entry.scale is not None for entry in controls) else None,
        "preset": preset,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "clip_guidance_scale": clip_guidance_scale,
        "sampler": sampler,
        "spacing": spacing,
        "eta": eta,
        **_sides(width, height, size),
        "strength": strength,
        "mask_blur": mask_blur,
        "hires_scale": hires_scale,
        "hires_strength": hires_strength,
        "clip_skip": clip_skip,
        "seed": seed,
        "num_images": num_images,
        "batch_size": batch_size,
    }
    common = {"num_images": 1} | common_settings(options, settings or [])
    entries = _entries(_subject(prompt, class_), prompts_file, image, mask, outpaint)
    axes = grid_of(vary or [], "--vary")
    process = Process.of_launcher()
    _check_seed(entries, common, resume, process)
    entries = varied(entries, axes, common)
    # refused before any library or weight is loaded
    requests = _requests(entries, common, shown=bool(controls or prompt_pictures))
    check_target(output, sum(request.num_images for request in requests), resume=resume)
    _check_used(requests, weaker, clip)
    if steps_gif and cascade:
        raise ConfigError("--steps-gif shows the steps of one model, not of a --cascade")
    _check_beside(output, requests, process, resume=resume, grid=grid, steps_gif=steps_gif)
    suffix = _suffix(output, picture_format, entries)
    if annotate is not None and not controls:
        raise ConfigError("--annotate has no effect without --control")
    loras = [adapter_and_weight(text) for text in lora or []]
    words = [embedding_and_word(text) for text in embedding or []]
    _check_sizes(model, requests)
    where = process.device(device)
    if offload is not None:  # a model larger than the GPU is loaded where it stays, by torch
        runtime = Runtime.torch if runtime is Runtime.auto else runtime
    pipe = loaded(model, where if offload is None else "cpu", dtype, variant, revision, runtime, speed, quantize)
    if fast:
        pipe.load_few_steps()
    load_extras(pipe, loras, words, vae)
    if offload is not None:
        from latentdiff.runtime.device import usable_device

        pipe.offload(usable_device(where), layers=offload is Offload.sequential, blocks=offload is Offload.block)
    _load_models(pipe, weaker, refiner, cascade or [], clip, upscaler)
    hints = load_controls(pipe, controls, annotate) if controls else ()
    prompts = load_image_prompts(pipe, adapters, [picture for picture, _ in prompt_pictures]) if prompt_pictures else ()
    jobs = _jobs(pipe, entries, requests, common, hints, prompts)
    paths: list[Path] = []
    for path, record in write_all(pipe.painter, jobs, Target(output, suffix, metadata, resume, steps_gif), process):
        paths.append(path)
        line = {"path": str(path), "seed": record.seed, "width": record.width, "height": record.height}
        if steps_gif:
            line["steps_gif"] = str(path.with_suffix(".gif"))
        terminal.result(json.dumps(line | {"prompt": record.request["prompt"]}) if json_lines else path)
    if grid:
        sheet = write_grid(paths, entries, axes, requests[0].num_images, output)
        terminal.result(json.dumps({"grid": str(sheet)}) if json_lines else sheet)


def _load_models(
    pipe: LatentDiffusionPipeline,
    weaker: str | None,
    refiner: str | None,
    cascade: Sequence[str],
    clip: Path | None,
    upscaler: Path | None,
) -> None:
    """Load further models beside the model."""
    if weaker is not None:
        pipe.load_weaker(weaker)
    if refiner is not None:
        pipe.load_refiner(refiner)
    for each in cascade:
        pipe.load_cascade(each)
    if clip is not None:
        pipe.load_clip(clip)
    if upscaler is not None:
        pipe.load_upscaler(upscaler)


def _sides(width: int | None, height: int | None, size: str | None) -> dict[str, int | None]:
    if size is None:
        return {"width": width, "height": height}
    across, x, down = size.lower().partition("x")
    digits = x and _number(across) and _number(down)
    if width is not None or height is not None or not digits:
        raise ConfigError(f"--size must be WIDTHxHEIGHT, and replaces --width and --height (got {size!r})")
    return {"width": int(across), "height": int(down)}


def _subject(prompt: str | None, class_: str | None) -> str | None:
    """The prompt, or the class in its place. Raises ConfigError for both."""
    if prompt is not None and class_ is not None:
        raise ConfigError("--class replaces the prompt: give only one of them")
    return prompt if class_ is None else class_


def _scales(scales: Sequence[float | None], adapters: int) -> tuple[float, ...] | None:
    """The scale of each IP-Adapter; None if none is given. Raises ConfigError for adapters without pictures."""
    if not scales and not adapters:
        return None
    if not scales or not adapters or (adapters > 1 and len(scales) != adapters):
        raise ConfigError(
            "--image-prompt and --ip-adapter require each other; several adapters take one picture each "
            f"(got {len(scales)} pictures, {adapters} adapters)"
        )
    known = [scale for scale in scales if scale is not None]
    if not known:
        return None
    if adapters == 1:
        if len(set(known)) > 1:
            raise ConfigError("one IP-Adapter has one scale. Repeat --ip-adapter for each picture")
        return (known[0],)
    return tuple(1.0 if scale is None else scale for scale in scales)


def _entries(
    prompt: str | None, prompts_file: Path | None, image: Path | None, mask: Path | None, outpaint: str | None
) -> list[PromptEntry]:
    """The command's entries; its picture serves entries without one. Raises ConfigError."""
    if (prompt is None) == (prompts_file is None):
        raise ConfigError("give a prompt, or a --prompts-file, and not both")
    entries = [PromptEntry(one_prompt(prompt))] if prompt is not None else read_prompts(prompts_file or Path())
    margins = None if outpaint is None else _margins(outpaint)
    if image is None and mask is None and margins is None:
        return entries
    return [
        replace(entry, image=entry.image or image, mask=entry.mask or mask, outpaint=entry.outpaint or margins)
        for entry in entries
    ]


def _margins(outpaint: str) -> tuple[int, ...]:
    from latentdiff.drawing.inputs import margins_of

    parts = [part.strip() for part in outpaint.split(",")]
    if len(parts) != 4 or not all(map(_number, parts)):
        raise ConfigError(f"--outpaint must be LEFT,TOP,RIGHT,BOTTOM in pixels (got {outpaint[:40]!r})")
    return margins_of([int(part) for part in parts])


def _number(text: str) -> bool:
    """Whether a text is a whole number of pixels: a few digits."""
    return text.isdecimal() and len(text) < 10


def _requests(entries: Sequence[PromptEntry], common: dict[str, Any], *, shown: bool) -> list[Request]:
    """The validated requests of the entries, completed from the command's options; seeds are consecutive.

    shown: pictures say what to draw, so a prompt may be empty.
    """
    from latentdiff.drawing.request import request

    requests: list[Request] = []
    for entry in entries:
        counted = {"seed": requests[-1].seed + requests[-1].num_images} if requests else {}
        with _naming(entry):
            if not entry.prompt.strip() and not shown:
                raise ConfigError("prompt is empty. Say what to draw")
            requests.append(request(prompt=entry.prompt, **(common | counted | entry.settings)))
    return requests


@contextmanager
def _naming(entry: PromptEntry) -> Iterator[None]:
    """A block whose errors name the line of the prompt."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{entry.where}: {error}" if entry.where else str(error)) from None


def _check_seed(entries: Sequence[PromptEntry], common: dict[str, Any], resume: bool, process: Process) -> None:
    """Raises ConfigError if several starts or processes draw one set of pictures without a common seed."""
    if (resume or process.processes > 1) and "seed" not in common | entries[0].settings:
        why = "--resume" if resume else "a command of several processes"
        raise ConfigError(f"{why} requires --seed: without it each start draws other pictures")


def _check_used(requests: Sequence[Request], weaker: str | None, clip: Path | None) -> None:
    """Raises ConfigError for options that none of the pictures uses."""
    if weaker is not None and all(one.autoguidance_scale == 1 for one in requests):
        raise ConfigError("--weaker has no effect without --set autoguidance_scale=2")
    if clip is not None and not any(one.clip_guidance_scale for one in requests):
        raise ConfigError("--clip has no effect without --clip-guidance-scale")


def _check_beside(
    output: Path, requests: Sequence[Request], process: Process, *, resume: bool, grid: bool, steps_gif: bool
) -> None:
    """Raises ConfigError for a grid or animations that cannot be written beside the pictures."""
    from latentdiff.drawing.sheet import MOST_CELLS

    if grid and (resume or process.processes > 1 or suffix_of(output)):
        raise ConfigError("--grid requires all pictures of one command in a folder: no --resume, no other process")
    counts = {one.num_images for one in requests}
    if grid and (len(counts) > 1 or sum(one.num_images for one in requests) > MOST_CELLS):
        raise ConfigError(f"--grid requires equally many pictures of each prompt, and at most {MOST_CELLS} in all")
    if steps_gif and not resume and suffix_of(output) and os.path.lexists(output.with_suffix(".gif")):
        raise ConfigError(f"file exists ({output.with_suffix('.gif')}). Pictures are never overwritten")


def _suffix(output: Path, chosen: Format | None, entries: Sequence[PromptEntry]) -> str:
    """The suffix of the pictures, from the output's name, or --format for a folder. Raises ConfigError for both."""
    own = suffix_of(output)
    if own and chosen is not None:
        raise ConfigError(f"--format applies to the pictures in a folder; {output} is a file")
    suffix = own or f".{(chosen or Format.png).value}"
    if loses_pixels(suffix) and any(entry.mask or entry.outpaint for entry in entries):
        terminal.warning("JPEG changes the pixels that a mask keeps; PNG and WebP do not")
    return suffix


def _check_sizes(model: str | None, requests: Sequence[Request]) -> None:
    """Raises ConfigError for sizes that the model cannot draw, from its configs, before its weights are read."""
    sizes = {(one.width, one.height) for one in requests} - {(None, None)}
    if not sizes:
        return
    from latentdiff.drawing.request import check_size
    from latentdiff.families import check_folder
    from latentdiff.families.loading import place_of
    from latentdiff.formats.folder import picture_geometry

    folder = place_of(model)
    if not folder.is_dir():
        return  # unknown here; sizes are checked after loading
    check_folder(folder)
    multiple, _ = picture_geometry(folder)
    for width, height in sizes:
        for name, side in (("width", width), ("height", height)):
            if side is not None:
                check_size(name, side, multiple)


def _jobs(
    pipe: LatentDiffusionPipeline,
    entries: Sequence[PromptEntry],
    requests: Sequence[Request],
    common: dict[str, Any],
    hints: tuple[Hint, ...] = (),
    image_prompts: tuple[ImagePrompt, ...] = (),
) -> list[Job]:
    """A job for every picture, completed with the model's recommended settings."""
    from latentdiff.drawing.draw import jobs_of

    jobs: list[Job] = []
    for entry, first in zip(entries, requests, strict=True):
        own = common | entry.settings | {"seed": first.seed}
        with _naming(entry):
            request = pipe.request(entry.prompt, **own)
            if not jobs and entry.image is None:
                pipe.begin(request, sum(one.num_images for one in requests))
            jobs += jobs_of(
                pipe.model, request, _canvas(pipe, entry, request), hints=hints, image_prompts=image_prompts
            )
        _warn(pipe, request)
    return jobs


def _canvas(pipe: LatentDiffusionPipeline, entry: PromptEntry, request: Request) -> Any:
    from latentdiff.core.files import recorded
    from latentdiff.drawing.canvas import BLACK, NONE, Margins
    from latentdiff.drawing.draw import canvas_of
    from latentdiff.drawing.plan import plan

    image = None if entry.image is None else open_picture(entry.image)
    mask = None if entry.mask is None else open_picture(entry.mask, BLACK)
    names = [None if path is None else recorded(path) for path in (entry.image, entry.mask)]
    margins = NONE if entry.outpaint is None else Margins(*entry.outpaint)
    canvas = canvas_of(pipe.model, request, image, mask, margins=margins, names=(names[0], names[1]))
    if canvas is not None:
        steps = plan(request, pipe.model, canvas).steps[0]
        terminal.note(f"{entry.image}: runs {steps} of {request.num_inference_steps} steps")
    return canvas


def _warn(pipe: LatentDiffusionPipeline, request: Request) -> None:
    """Warn about prompts that are cut or read in chunks."""
    from latentdiff.drawing.prompts import style_of

    for name in ("prompt", "negative_prompt"):
        read, limit = pipe.model.encoder.read(getattr(request, name), style_of(request)), pipe.model.encoder.length
        if read.cut:
            terminal.warning(f"{name} has {read.tokens} tokens and is cut to the model's {limit}")
        elif read.chunks > 1:
            terminal.note(f"{name} of {read.tokens} tokens is read in {read.chunks} chunks")
