"""Reports of a fine-tuning: pictures of the same prompts and noise during training, a page and a card after it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.core.errors import DataError
from latentdiff.core.files import atomic, recorded, write_text
from latentdiff.core.images import as_picture, coloured, to_images
from latentdiff.core.text import printable, quoted
from latentdiff.core.vocabulary import words_of
from latentdiff.data.examples import Examples
from latentdiff.drawing.draw import draw_prompts
from latentdiff.drawing.hints import Hint, hints_of
from latentdiff.drawing.image_prompts import ImagePrompt, image_prompts_of
from latentdiff.drawing.painter import Painter
from latentdiff.evaluation.report.page import Entry, as_html
from latentdiff.evaluation.report.plots import Plot, Series, as_figure
from latentdiff.families.clip import load_own_scorer
from latentdiff.settings.config import flat
from latentdiff.settings.finetuning import STAGE, FineTuning
from latentdiff.stages import few_steps
from latentdiff.stages.methods import student_settings
from latentdiff.stages.run import Run
from latentdiff.training.denoiser import TIME_BINS, DenoiserStage, validation_losses
from latentdiff.training.log import LOG, read_log

PAGE, CARD, STRIP = "report.html", "README.md", "strip.png"


def report(
    painter: Painter,
    config: FineTuning,
    examples: Examples,
    seen: Examples,
    validation: DenoiserStage,
    directory: Path,
    step: int,
) -> dict[str, float]:
    """The validation loss, and a picture of every prompt in a row, `step-....png`.

    seen: the pictures that a control reads, row by row. If the model has a CLIP of its own that knows the words of the
    prompts, the pictures' score too.
    """
    numbers = validation_losses(validation, TIME_BINS, painter.model.path, config.finetune.training.train_batch_size)
    prompts = prompts_of(config, examples)
    pictures = _draw(painter, config, prompts, seen)
    _save(np.concatenate(list(pictures), 1), directory / f"step-{step:08d}.png", {"step": step, "prompts": prompts})
    folder = painter.model.card.folder
    known = painter.model.card.words or frozenset()
    if config.method in ("full", "lora") and folder and (folder / "clip").is_dir() and words_of(prompts) <= known:
        device = painter.model.place.device
        images = to_images(coloured(pictures)).to(device)
        numbers["clip_score"] = float(load_own_scorer(folder).to(device).score(prompts, images).mean())
    return numbers


def keep_rows_apart(directory: Path, config: FineTuning, examples: Examples) -> None:
    """Move rows with other prompts, seeds or sizes into a folder beside, since the page compares rows."""
    settings = config.previews.model_dump(mode="json") | {"size": config.image_size}
    content = json.dumps(settings | {"prompts": prompts_of(config, examples)}, sort_keys=True) + "\n"
    path = directory / "prompts.json"
    if directory.is_dir() and not (path.is_file() and path.read_text(encoding="utf-8") == content):
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}-{n}").exists())
        directory.rename(directory.with_name(f"{directory.name}-{number}"))
    directory.mkdir(parents=True, exist_ok=True)
    write_text(path, content)


def prompts_of(config: FineTuning, examples: Examples) -> list[str]:
    """The config's prompts, or captions of validation pictures, and with a prior as many of the class."""
    if config.previews.prompts:
        return list(config.previews.prompts)
    captions = [examples.caption(row % len(examples), 0) for row in range(config.previews.count)]
    return captions + [config.prior.prompt] * len(captions) if config.prior.prompt else captions


def _draw(painter: Painter, config: FineTuning, prompts: list[str], seen: Examples) -> np.ndarray:
    """Pictures of prompts, uint8 (N, H, W, C), always from the same noise.

    A control or an IP-Adapter reads validation pictures.
    """
    side = config.image_size
    hints: list[tuple[Hint, ...]] = []
    image_prompts: list[tuple[ImagePrompt, ...]] = []
    if painter.controls or painter.ip_adapters:
        pictures = [coloured(seen.image(row % len(seen), 0, (side, side))) for row in range(len(prompts))]
        change, counts = config.control.made_by, (len(painter.controls), len(painter.ip_adapters))
        hints = [hints_of(picture if counts[0] else None, counts[0], annotated=change) for picture in pictures]
        image_prompts = [image_prompts_of(picture if counts[1] else None, None, counts[1]) for picture in pictures]
    options: dict[str, Any] = {
        "height": side,
        "width": side,
        "num_inference_steps": config.previews.num_inference_steps,
    }
    if config.method == "consistency":
        options |= student_settings(painter.model, config)
    return draw_prompts(
        painter, prompts, seed=config.previews.seed, hints=hints, image_prompts=image_prompts, **options
    )


def _save(pixels: np.ndarray, path: Path, about: Mapping[str, Any]) -> None:
    """Write a sheet of pictures that says in a text chunk what it shows."""
    info = PngInfo()
    info.add_itxt("Description", json.dumps(dict(about), ensure_ascii=False))
    with atomic(path) as made:
        as_picture(pixels).save(made, pnginfo=info)


def write_page(run: Run[FineTuning], paths: Sequence[Path], sheets: Sequence[np.ndarray] = ()) -> list[Path]:
    """Write the page and the card beside the trained weights; returns their paths.

    sheets: of a student beside its teacher, for each prompt; see few_steps.py.
    """
    folder, lines = run.folder, read_log(run.folder / STAGE / LOG)
    files = sorted((folder / STAGE / "samples").glob("step-*.png"))
    rows, steps = [_row(path) for path in files], [int(path.stem.removeprefix("step-")) for path in files]
    if rows:
        about = {"steps": steps, "prompts": prompts_of(run.config, run.data.validation)}
        _save(np.concatenate(rows), folder / STRIP, about)
    if sheets:
        about = {"what": few_steps.CAPTION, "prompts": prompts_of(run.config, run.data.validation)}
        _save(np.concatenate(list(sheets)), folder / few_steps.FILE, about)
    write_text(folder / PAGE, _page(run, lines, rows, sheets))
    write_text(folder / CARD, _card(run, lines, paths, steps))
    return [folder / PAGE, folder / CARD]


def _row(path: Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except OSError:
        raise DataError(f"a row of pictures cannot be read ({path}). Remove it; the weights are saved") from None


def _page(
    run: Run[FineTuning], lines: Sequence[Mapping[str, Any]], rows: list[np.ndarray], sheets: Sequence[np.ndarray]
) -> str:
    """The page: pictures before and after, prompt by prompt, curves of the losses, the settings."""
    config = run.config
    prompts = prompts_of(config, run.data.validation)
    ends = [np.split(row, len(prompts), 1) for row in (rows[:1] + rows[-1:])] or [[], []]
    sheet = []
    for prompt, first, last in zip(prompts, *ends, strict=False):
        gap = np.full((len(first), 2, 3), 255, np.uint8)
        sheet.append((np.concatenate([first, gap, last], 1), {"before, after": prompt}))
    sheet += [(each, {few_steps.CAPTION: prompt}) for prompt, each in zip(prompts, sheets, strict=False)]
    settings = tuple(f"{key} = {value}" for key, value in _differing(config).items())
    sections = [
        Entry("model", _model(config)),
        Entry("pictures", f"{len(run.data.training):,} of {printable(Path(config.data.pictures.source).name)}"),
        Entry("validation", "before and after", tuple(_compared(lines))),
        Entry("settings", "that are not the defaults of every run", settings),
    ]
    curves = as_figure(Plot("losses", "step", "loss", (_curve(lines, "loss"), _curve(lines, "validation_loss"))))
    return as_html(f"{config.name}: {config.method}", sections, sheet, curves)


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    points = [line for line in lines if name in line]
    return Series(name.replace("_", " "), [line["step"] for line in points], [line[name] for line in points])


def _model(config: FineTuning) -> str:
    return recorded(Path(config.model)) if config.model else "the default model"


def _differing(config: FineTuning) -> dict[str, Any]:
    plain = flat(FineTuning.model_construct())
    settings = {key: value for key, value in flat(config).items() if plain.get(key) != value}
    places = ("source", "model", "encoder")  # pages do not reveal folders
    return {
        key: printable(Path(value).name) if value and key.split(".")[-1] in places else value
        for key, value in settings.items()
    }


def _compared(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The numbers of the first and the last validation, compared."""
    reports = [line for line in lines if "loss" not in line]
    if not reports:  # a sharded network has no validation
        return []
    first, last = reports[0], reports[-1]
    names = [name for name in first if name != "step" and name in last]
    return [f"{_in_words(name)}: {first[name]:.4f} -> {last[name]:.4f}" for name in names]


def _in_words(name: str) -> str:
    """What a number of a validation is."""
    if name == "clip_score":
        return "CLIP score of the drawn pictures, by the model's own CLIP"
    low, _, high = name.removeprefix("loss_at_").partition("_to_")
    return f"validation loss at times {low} to {high}" if high else name.replace("_", " ")


def _card(run: Run[FineTuning], lines: Sequence[Mapping[str, Any]], paths: Sequence[Path], steps: Sequence[int]) -> str:
    """A model card: the model, the data, the method, how to use it, what changed."""
    config = run.config
    settings = "\n".join(f"| `{key}` | {quoted(value)} |" for key, value in _differing(config).items())
    numbers = "\n".join(f"- {line}" for line in _compared(lines))
    prompts = "; ".join(map(quoted, prompts_of(config, run.data.validation)))
    return f"""# {quoted(config.name)}

Trained on {len(run.data.training):,} pictures from {quoted(_model(config))}, by {config.method}.
Made with latentdiff {version("latentdiff")}.

![from the first step to the last, always the same prompts and noise]({STRIP})

Rows: steps {", ".join(f"{step:,}" for step in steps)}. Columns: {prompts}.
{_beside_teacher(config)}
## Use

```console
{_use(config, paths[0])}
```

## Validation, before -> after

{numbers}

## Settings

| key | value |
|---|---|
{settings}
"""


def _beside_teacher(config: FineTuning) -> str:
    """The picture of a student beside its teacher; nothing for other methods."""
    return f"\n![{few_steps.CAPTION}]({few_steps.FILE})\n" if config.method == "consistency" else ""


def _use(config: FineTuning, path: Path) -> str:
    """A command for the folder where the training was started; of an absolute path only the name is given."""
    options = {
        "-m": config.model and recorded(Path(config.model)),
        "--variant": config.variant,
        "--revision": config.revision,
    }
    words = [word for option, value in options.items() if value for word in (option, value)]
    prompt = config.data.pictures.instance_prompt or "..."
    if config.method == "textual-inversion":
        prompt, words = f"a {config.word.token}", [*words, "--embedding", recorded(path)]
    elif config.low_rank:
        words += ["--lora", recorded(path), *(["--preset", "lcm"] if config.method == "consistency" else [])]
    elif config.method == "controlnet":
        change = config.control.made_by
        words += ["--control", f"{recorded(path)}:picture.png", *(["--annotate", change] if change else [])]
    elif config.method == "ip-adapter":
        words += ["--ip-adapter", recorded(path), "--image-prompt", "picture.png"]
    else:
        words = ["-m", recorded(path)]
    return "$ " + shlex.join(["latentdiff", "generate", prompt, *words])
