"""Quality against evaluations of a model: its own steps with guidance, and students of few steps.

    python scripts/control.py make SCENES --pictures 12000
    latentdiff finetune scenes-64 SCENES/train -o LCM --method consistency --rank 32 --set lora.convolutions=true
    latentdiff finetune scenes-64 SCENES/train -o ECT --method consistency --rank 32 --set lora.convolutions=true \
        --set consistency.objective=ect
    python scripts/few_steps.py LCM=LCM/pytorch_lora_weights.safetensors ECT=ECT/pytorch_lora_weights.safetensors

An evaluation is one run of the U-Net for one picture: a guided step takes two, an unguided one takes one. Each line of
the table, in Markdown, has the composition score that an oracle reads, and the Frechet distance of the same pictures
from as many other true scenes, in the features of the model's own CLIP, both with standard errors. With --sprites and
--judge (scripts/judge.py trains one) the scenes are of things, which the judge reads, and a further column has the
share of single things that it recognises. After the table: the share of the score of 40 guided evaluations that each
student reaches in four.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

EVALUATIONS = (1, 2, 4, 8)
TEACHERS = {"unipc": {"sampler": "unipc"}, "dpmpp_2m": {"sampler": "dpmpp_2m"}}


def cells(students: dict[str, str]) -> list[tuple[str, int, str | None, dict]]:
    """The lines of the table: name, evaluations, the student's file, settings."""
    lines: list[tuple[str, int, str | None, dict]] = [("the model's 20 steps", 40, None, {})]
    for name, sampler in TEACHERS.items():
        for count in EVALUATIONS:
            guided = {} if count > 1 else {"guidance_scale": 1.0}
            lines.append((name, count, None, {**sampler, **guided, "num_inference_steps": max(1, count // 2)}))
    for name, file in students.items():
        lines += [(name, count, file, {"num_inference_steps": count}) for count in EVALUATIONS]
    return lines


def measured(args, file: str | None, settings: dict, benchmark, extractor, true: np.ndarray) -> tuple:
    """The scores of composition and, by a judge, of single things, and the distance."""
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.drawing.presets import PRESETS
    from latentdiff.evaluation.benchmark import SpriteBenchmark
    from latentdiff.evaluation.composition import evaluate_composition
    from latentdiff.evaluation.distances import frechet
    from latentdiff.evaluation.jackknife import jackknife
    from latentdiff.evaluation.recognition import chosen, draw_and_name

    pipe = LatentDiffusionPipeline.from_pretrained(args.model, device="cpu")
    if file is not None:
        pipe.load_lora_weights(file, fuse=True)
        settings = {**PRESETS["lcm"], **settings}
    score = evaluate_composition(pipe.painter, benchmark, pictures=args.pictures, **settings)
    things = None
    if isinstance(benchmark, SpriteBenchmark):
        sprites = chosen(benchmark.library, args.things, 0)
        with tempfile.TemporaryDirectory() as folder:
            things = draw_and_name(pipe.painter, benchmark, sprites, 0, Path(folder), **settings).right(1)
    images = np.concatenate(list(score.pictures.values()))
    return score, things, jackknife(frechet, extractor.of(images), true)


def true_features(extractor, benchmark, pictures: int) -> np.ndarray:
    """Features of as many true scenes, of which none has a prompt of the drawn ones."""
    from latentdiff.data.scenes import CATEGORIES
    from latentdiff.evaluation.composition import evaluation_scenes

    kinds = [evaluation_scenes(category, pictures, 1, benchmark=benchmark) for category in CATEGORIES]
    return extractor.of(np.stack([benchmark.picture(scene) for scenes in kinds for scene in scenes]))


def benchmark_of(args, card):
    """Scenes of things that a judge reads, or of shapes that the oracle reads."""
    from latentdiff.data.sprites.library import Library
    from latentdiff.evaluation.benchmark import SpriteBenchmark, of_shapes
    from latentdiff.evaluation.judge import Judge

    if args.judge is None:
        return of_shapes(card)
    return SpriteBenchmark(Library(args.sprites), card.size[0], 0.0, Judge.load(args.judge))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", metavar="NAME=FILE")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=100, help="of each of the six categories")
    parser.add_argument("--things", type=int, default=500, help="single things for the judge")
    parser.add_argument("--sprites", type=Path)
    parser.add_argument("--judge", type=Path)
    args = parser.parse_args()
    if (args.judge is None) != (args.sprites is None):
        parser.error("--judge and --sprites require each other")

    from latentdiff.evaluation.features import of_model
    from latentdiff.families.loading import stored_model

    card = stored_model(args.model).card
    extractor, benchmark = of_model(card.folder), benchmark_of(args, card)
    true = true_features(extractor, benchmark, args.pictures)
    students, scores = dict(each.split("=", 1) for each in args.students), {}
    column = " recognised |" if args.judge else ""
    print(
        f"| | evaluations | composition |{column} Frechet distance |\n|---|---|---|---|{'---|' if args.judge else ''}"
    )
    for name, count, file, settings in cells(students):
        score, things, far = measured(args, file, settings, benchmark, extractor, true)
        scores[name, count] = score
        single = "" if things is None else f" {things.mean():.3f} ± {things.std() / len(things) ** 0.5:.3f} |"
        figures = f"{score.overall:.3f} ± {score.error:.3f} |{single} {far.value:.4f} ± {far.error:.4f}"
        print(f"| {name} | {count} | {figures} |", flush=True)
    best = scores["the model's 20 steps", 40].overall
    for name in students:
        print(f"{name} in 4 evaluations: {scores[name, 4].overall / best:.3f} of the model's 40")


if __name__ == "__main__":
    main()
