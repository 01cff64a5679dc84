"""`latentdiff evaluate`: measurements of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli.options import Precision, Runtime
from latentdiff.output import check_writable, write_new

app = typer.Typer(no_args_is_help=True, help="Measure a model.")


@app.callback()
def _evaluate() -> None:
    """Measure a model."""


@app.command()
def composition(
    model: Annotated[Path | None, typer.Argument(help="A model folder (default: scenes-64).")] = None,
    pictures: Annotated[int, typer.Option(min=4, help="Pictures a category, four a prompt.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and pictures.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (default: the model's).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="(default: the model's).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the figures to this new JSON file.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the arithmetic (default: the runtime's).")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="auto: OpenVINO on a CPU where the model is exported.")
    ] = Runtime.auto,
) -> None:
    """Score a scenes model in GenEval's six categories, with held-out pairs and the autoencoder's ceiling beside.

    At 300 pictures a category 3,600 are drawn: some ten minutes on two CPU cores.
    """
    import json

    from latentdiff.errors import ConfigError
    from latentdiff.evaluation.composition import as_dict, as_text, ceiling, evaluate_composition
    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.request import request

    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    settings = {name: value for name, value in given.items() if value is not None}
    request(prompt="checked before anything is loaded", seed=seed, **settings)
    if output and (os.path.lexists(output) or not output.absolute().parent.is_dir()):
        raise ConfigError(f"cannot write to {output}: it exists, or its folder does not")
    if output:
        check_writable(output, output.parent)
    pipe = LatentDiffusionPipeline.from_pretrained(
        model, device=device, runtime=runtime.value, torch_dtype=dtype and dtype.value
    )
    scores = {
        "model": evaluate_composition(pipe, pictures=pictures, seed=seed, **settings),
        "held out": evaluate_composition(pipe, pictures=pictures, seed=seed, held_out=True, **settings),
        "ceiling": ceiling(pipe, pictures=pictures, seed=seed),
    }
    for title, score in scores.items():
        typer.echo(as_text(score, title) + "\n")
    if output:
        figures = {title: as_dict(score) for title, score in scores.items()}
        tree = {"model_hash": pipe.card.hash, "settings": pipe.card.defaults | settings, **figures}
        write_new(output, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())
