"""A page of a hundred pictures of things chosen by a fixed random rule, with the judge's verdict under each.

    python scripts/hundred.py MODEL emoji/sprites JUDGE hundred.png

The things are the first hundred of `latentdiff evaluate --only recognition`, with the same seeds. Under each picture
stands its prompt, then the judge's likeliest name, in green if it is the right one.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latentdiff import LatentDiffusionPipeline
from latentdiff.data.sprites.library import Library
from latentdiff.evaluation.benchmark import SpriteBenchmark
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.recognition import Recognition, chosen, draw_and_name

ACROSS, GAP, TEXT, LETTERS = 10, 6, 11, 22
RIGHT, WRONG = "#15803d", "#b91c1c"


def page(result: Recognition) -> Image.Image:
    """The pictures in rows of ten, each with two lines for its prompt and one for the judge's name."""
    font, side, line = ImageFont.load_default(TEXT), result.pictures.shape[1], TEXT + 3
    height = side + 3 * line + GAP
    sheet = Image.new("RGB", (ACROSS * (side + GAP), -(-len(result.pictures) // ACROSS) * height), "white")
    pen = ImageDraw.Draw(sheet)
    rows = zip(result.pictures, result.prompts, result.names, result.right(1), strict=True)
    for number, (picture, prompt, names, right) in enumerate(rows):
        x, y = number % ACROSS * (side + GAP), number // ACROSS * height
        sheet.paste(Image.fromarray(picture), (x, y))
        lines = textwrap.wrap(prompt, LETTERS, max_lines=2, placeholder=" ...")
        pen.text((x, y + side), "\n".join(lines), "black", font, spacing=3)
        verdict = textwrap.shorten(names[0], LETTERS, placeholder=" ...")
        pen.text((x, y + side + 2 * line), verdict, RIGHT if right else WRONG, font)
    return sheet


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sprites", type=Path)
    parser.add_argument("judge", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float, help="the model's if left out")
    parser.add_argument("--pictures", type=int, default=100)
    arguments = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(arguments.model)
    library, judge = Library(arguments.sprites), Judge.load(arguments.judge)
    benchmark = SpriteBenchmark(library, pipe.card.size[0], 0.0, judge)
    things = chosen(benchmark.library, arguments.pictures, arguments.seed)
    settings = {} if arguments.guidance_scale is None else {"guidance_scale": arguments.guidance_scale}
    with tempfile.TemporaryDirectory() as folder:
        result = draw_and_name(pipe.painter, benchmark, things, arguments.seed, Path(folder), **settings)
    page(result).save(arguments.page, optimize=True)
    right = [result.right(among) for among in (1, 5)]
    print(f"recognised@1 {right[0].mean():.3f}, @5 {right[1].mean():.3f} of {len(things)} things")


if __name__ == "__main__":
    main()
