"""Draw the pictures of the gallery: eight prompts, seeds 1 to 4, unpicked; print their table.

    python scripts/gallery.py [scenes-64|emoji-128]

Those of 64 pixels are shown twice as large, by nearest neighbour, so that what is seen is what was drawn.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff import LatentDiffusionPipeline

PROMPTS = {
    "emoji-128": (
        "a cat",
        "a red apple",
        "a sunflower",
        "an elephant",
        "a pizza on a blue background",
        "a penguin",
        "three strawberries",
        "a dog and a fish",
    ),
    "scenes-64": (
        "a red circle above a blue square",
        "three green stars",
        "a yellow cross to the left of a pink triangle",
        "a large orange ring",
        "a cyan star and a purple square on a black background",
        "four blue triangles",
        "a green ring below a red star",
        "a pink cross",  # a pair that training never drew
    ),
}
IMAGES = Path(__file__).parent.parent / "docs" / "images"
SHOWN = 256  # the side of a sheet of four, in pixels


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "scenes-64"
    pipe, folder = LatentDiffusionPipeline.from_pretrained(name), IMAGES / "gallery" / name
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for number, prompt in enumerate(PROMPTS[name], 1):
        a, b, c, d = pipe(prompt, seed=1, num_images_per_prompt=4, output_type="uint8").images
        sheet = Image.fromarray(np.vstack([np.hstack([a, b]), np.hstack([c, d])]))
        path = folder / f"{number}.png"
        sheet.resize((SHOWN, SHOWN), Image.Resampling.NEAREST).save(path, optimize=True)
        cells.append(f"![{prompt}](docs/images/gallery/{name}/{path.name})<br>{prompt}")
    for first in range(0, len(cells), 4):
        print("| " + " | ".join(cells[first : first + 4]) + " |")
        if first == 0:
            print("|" + " --- |" * 4)


if __name__ == "__main__":
    main()
