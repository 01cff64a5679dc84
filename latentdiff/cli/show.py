"""`latentdiff show`: plots of what a model does, as a picture or a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.cli.loading import common_settings, loaded
from latentdiff.cli.options import OUTPUTS, Model, Runtime
from latentdiff.core.errors import ConfigError
from latentdiff.core.files import check_writable

if TYPE_CHECKING:
    import numpy as np

    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.show import Sheet

app = typer.Typer(no_args_is_help=True, help="Show what a model does: schedule, noise, steps, attention, latents.")

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A folder, or a new .png, .svg or .html file (default: outputs).")
]
Picture = Annotated[Path, typer.Argument(help="A picture; it is resized to the model's size.")]
Prompt = Annotated[str, typer.Argument(help="The prompt.")]
Columns = Annotated[int, typer.Option(help="Number of pictures in a row.")]
Seed = Annotated[int, typer.Option("--seed", "-s", help="The seed.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting of drawing, NAME=VALUE.")]


@app.callback()
def _show() -> None:
    """Show what a model does: schedule, noise, steps, attention, latents."""


@app.command()
def schedule(
    model: Model = None,
    steps: Annotated[int, typer.Option(help="Steps of the grids.")] = 20,
    output: Output = None,
) -> None:
    """The noise levels, the weights of the loss, and where each grid of steps lies."""
    path = _target(output, "schedule")
    from latentdiff import show

    _write(show.schedule(_pipe(model), steps), path)


@app.command()
def forward(picture: Picture, model: Model = None, columns: Columns = 8, seed: Seed = 0, output: Output = None) -> None:
    """A picture under rising noise, in pixels and in latents."""
    path = _target(output, "forward")
    from latentdiff import show

    pipe = _pipe(model)
    _write(show.forward(pipe, _sized(picture, pipe), columns=columns, seed=seed), path)


@app.command()
def reverse(
    prompt: Prompt,
    model: Model = None,
    columns: Columns = 8,
    seed: Seed = 0,
    set_: Set = None,
    output: Output = None,
) -> None:
    """The steps from noise to a picture, and the network's guess at each."""
    path, settings = _target(output, "reverse"), _settings(set_, seed)
    from latentdiff import show

    _write(show.reverse(_pipe(model), prompt, columns=columns, **settings), path)


@app.command()
def attention(prompt: Prompt, model: Model = None, seed: Seed = 0, set_: Set = None, output: Output = None) -> None:
    """Where each word of the prompt acts."""
    path, settings = _target(output, "attention"), _settings(set_, seed)
    from latentdiff import show

    _write(show.attention(_pipe(model, Runtime.torch), prompt, **settings), path)


@app.command()
def latents(picture: Picture, model: Model = None, output: Output = None) -> None:
    """The channels of a picture's latents, and the picture decoded again."""
    path = _target(output, "latents")
    from latentdiff import show

    pipe = _pipe(model)
    _write(show.latents(pipe, _sized(picture, pipe)), path)


@app.command()
def samplers(
    prompt: Prompt,
    model: Model = None,
    names: Annotated[str | None, typer.Option(help="Samplers, separated by commas.")] = None,
    steps: Annotated[str | None, typer.Option(help="Numbers of steps, separated by commas.")] = None,
    seed: Seed = 0,
    set_: Set = None,
    output: Output = None,
) -> None:
    """One prompt by several samplers at several numbers of steps."""
    path, settings = _target(output, "samplers"), _settings(set_, seed)
    chosen: dict[str, Any] = {}
    if names is not None:
        chosen["names"] = [name.strip() for name in names.split(",")]
    if steps is not None:
        if not all(part.strip().isdecimal() and len(part) < 6 for part in steps.split(",")):
            raise ConfigError(f"--steps must be whole numbers, separated by commas (got {steps[:40]!r})")
        chosen["steps"] = [int(part) for part in steps.split(",")]
    from latentdiff import show

    _write(show.samplers(_pipe(model), prompt, **chosen, **settings), path)


def _target(output: Path | None, name: str) -> Path:
    """The file to write, in a folder NAME-NNNNN.png, checked before any work. Raises ConfigError."""
    from latentdiff.drawing.files import next_number
    from latentdiff.show.sheet import check_suffix

    path = output or OUTPUTS
    if not path.suffix or path.is_dir():
        number = next_number(path, rf"{name}-(\d{{5}})\.png")
        path = path / f"{name}-{number:05d}.png"
    check_suffix(path)
    if path.exists():
        raise ConfigError(f"file exists ({path}). Name another by --output")
    check_writable(path, path.parent)
    return path


def _settings(set_: list[str] | None, seed: int) -> dict[str, Any]:
    """The settings of drawing, checked before anything is loaded. Raises ConfigError."""
    from latentdiff.drawing.request import request

    values = common_settings({"seed": seed}, set_ or [])
    if "num_images" in values:
        raise ConfigError("num_images has no effect: a sheet has its own pictures")
    request(prompt="checked before anything is loaded", **values)
    return values


def _pipe(model: str | None, runtime: Runtime = Runtime.auto) -> LatentDiffusionPipeline:
    return loaded(model, None, None, None, None, runtime)


def _sized(picture: Path, pipe: LatentDiffusionPipeline) -> np.ndarray:
    """The largest middle part of a picture in the model's aspect, resized to its size, uint8 (H, W, 3)."""
    from latentdiff.drawing.files import open_fitted

    return open_fitted(picture, pipe.card.size)


def _write(sheet: Sheet, path: Path) -> None:
    terminal.note(sheet.text)
    terminal.result(sheet.save(path))
