"""Recipes of a denoiser at equal samples: the same data, latents, text encoder and seed, one choice changed at a time.

    python scripts/recipes.py configs/emoji-128.toml RUN recipes --steps 1500 --judge judge

RUN is a run of the config whose first two stages are finished; its latents are encoded once, for all recipes. Each
recipe is trained from nothing in `recipes/NAME` (an interrupted start goes on), then measured by `latentdiff evaluate`:
distances from held-out scenes by the run's own CLIP and, with a judge, the share of things that are recognised. The
table is printed in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DIFFUSION = ("denoiser.path=variance_preserving", "denoiser.times=uniform")
VELOCITY = (*DIFFUSION, "denoiser.prediction=v_prediction", "denoiser.schedule.zero_terminal_snr=true")
RECIPES: dict[str, tuple[str, ...]] = {
    "base": (),
    "AdamW": ("denoiser.training.optimizer=adamw",),
    "v": VELOCITY,
    "v, AdamW": (*VELOCITY, "denoiser.training.optimizer=adamw"),
    "v, twice the rate": (*VELOCITY, "denoiser.training.learning_rate=2e-3"),
    "v, min-SNR": (*VELOCITY, "denoiser.weighting=min_snr"),
    "epsilon, min-SNR": (*DIFFUSION, "denoiser.prediction=epsilon", "denoiser.weighting=min_snr"),
    "uniform times": ("denoiser.times=uniform",),
    "text encoder frozen": ("denoiser.tune_text_encoder=false",),
    "no pooled text": ("denoiser.pooled_text=false",),
}


def begun(run: Path, folder: Path) -> None:
    """The folder of a recipe with copies of the networks and latents of the run."""
    if folder.exists():
        return
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    for part in ("clip", "cache"):
        shutil.copytree(run / part, made / part, ignore=shutil.ignore_patterns("checkpoints"))
    for part in ("vae", "clip"):
        shutil.copytree(run / "model" / part, made / "model" / part)
    made.rename(folder)


def latentdiff(*words: object) -> None:
    """Run the command; stop if it fails."""
    subprocess.run([sys.executable, "-m", "latentdiff", *map(str, words)], check=True)


def trained(config: Path, folder: Path, steps: int, overrides: tuple[str, ...]) -> None:
    """Train the denoiser of one recipe."""
    settings = (
        f"denoiser.training.max_train_steps={steps}",
        f"denoiser.training.lr_warmup_steps={steps // 10}",
        f"denoiser.training.validation_steps={steps}",
        *overrides,
    )
    latentdiff("train", config, "-o", folder, "--stage", "denoiser", *set_by(settings))


def set_by(settings: Sequence[str]) -> list[str]:
    """The words of a command that set them."""
    return [word for each in settings for word in ("--set", each)]


def measured(folder: Path, pictures: int, judge: Path | None) -> dict[str, str]:
    """Figures with standard errors by name."""
    sections = ["distances", *(["recognition"] if judge else [])]
    words = ["--judge", judge] if judge else []
    report = folder / "report"
    latentdiff(
        "evaluate", folder / "model", "--data", folder / "config.toml", "--only", ",".join(sections),
        "--pictures", pictures, "-o", report, *words,
    )  # fmt: skip
    tree = json.loads((report / "metrics.json").read_text())["models"][0]["sections"]
    names = ("frechet", "cmmd", "clip_score", "recognised_1", "recognised_5")
    figures = {
        name: figure for section in tree.values() for name, figure in section["figures"].items() if name in names
    }
    return {name: f"{figure['value']:.4g} ± {figure['error'] or float('nan'):.2g}" for name, figure in figures.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--only", action="append", choices=RECIPES, help="a recipe's name; several may be given")
    parser.add_argument("--set", action="append", default=[], help="a setting of all recipes: data.count=100000")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    latentdiff("data", "cache", given.config, "-o", given.run, *set_by(given.set))
    rows = {}
    for name in given.only or RECIPES:
        folder = given.out / name.replace(", ", "-").replace(" ", "-")
        begun(given.run, folder)
        trained(given.config, folder, given.steps, (*given.set, *RECIPES[name]))
        rows[name] = measured(folder, given.pictures, given.judge)
        shutil.rmtree(folder / "cache", ignore_errors=True)
    heads = list(next(iter(rows.values())))
    print(f"| recipe | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
    for name, figures in rows.items():
        print(f"| {name} | {' | '.join(figures[head] for head in heads)} |")


if __name__ == "__main__":
    main()
