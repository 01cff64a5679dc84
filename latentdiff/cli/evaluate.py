"""`latentdiff evaluate`: measurements of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a model.")


@app.callback()
def _evaluate() -> None:
    """Measure a model."""


@app.command()
def composition(
    model: Annotated[Path | None, typer.Argument(help="A model folder [default: scenes-64].")] = None,
    pictures: Annotated[int, typer.Option(min=4, help="Pictures a category, four a prompt.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and pictures.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps [default: the model's].")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="[default: the model's].")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the figures there, as JSON.")
    ] = None,
) -> None:
    """Score a scenes model in GenEval's six categories, with held-out pairs and the autoencoder's ceiling beside."""
    import json

    from latentdiff.evaluation.composition import as_text, ceiling, evaluate_composition
    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.request import request

    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}
    settings = {name: value for name, value in given.items() if value is not None}
    request(prompt="checked before anything is loaded", seed=seed, **settings)
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    scores = {
        "model": evaluate_composition(pipe, pictures=pictures, seed=seed, **settings),
        "held out": evaluate_composition(pipe, pictures=pictures, seed=seed, held_out=True, **settings),
        "ceiling": ceiling(pipe, pictures=pictures, seed=seed),
    }
    for title, score in scores.items():
        typer.echo(as_text(score, title) + "\n")
    if output:
        from dataclasses import asdict

        figures = {
            title: {"overall": score.overall, **{name: asdict(share) for name, share in score.categories.items()}}
            for title, score in scores.items()
        }
        output.write_text(
            json.dumps({"model_hash": pipe.card.hash, "settings": pipe.card.defaults | settings, **figures}, indent=1)
        )
