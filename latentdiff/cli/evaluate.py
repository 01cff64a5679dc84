"""`latentdiff evaluate`: measurements of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the figures there, as JSON.")
    ] = None,
) -> None:
    """Score a scenes model in GenEval's six categories, with held-out pairs and the autoencoder's ceiling beside."""
    import json

    from latentdiff.evaluation.composition import as_text, ceiling, evaluate_composition
    from latentdiff.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(model)
    scores = {
        "model": evaluate_composition(pipe, pictures=pictures, seed=seed),
        "held out": evaluate_composition(pipe, pictures=pictures, seed=seed, held_out=True),
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
            json.dumps({"model_hash": pipe.card.hash, "settings": pipe.card.defaults, **figures}, indent=1)
        )
