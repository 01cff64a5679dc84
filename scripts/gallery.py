"""Draw the pictures of the gallery: eight prompts, the default model, seeds 1 to 4, unpicked; print their table.

    python scripts/gallery.py [MODEL]

Each is shown twice as large, by nearest neighbour, so that what is seen is what was drawn.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff import LatentDiffusionPipeline

PROMPTS = (
    "a red circle above a blue square",
    "three green stars",
    "a yellow cross to the left of a pink triangle",
    "a large orange ring",
    "a cyan star and a purple square on a black background",
    "four blue triangles",
    "a green ring below a red star",
    "a pink cross",  # a pair that training never drew
)
FOLDER = Path(__file__).parent.parent / "docs" / "images" / "gallery"


def main() -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cells = []
    for number, prompt in enumerate(PROMPTS, 1):
        a, b, c, d = pipe(prompt, seed=1, num_images_per_prompt=4, output_type="uint8").images
        sheet = Image.fromarray(np.vstack([np.hstack([a, b]), np.hstack([c, d])]))
        path = FOLDER / f"{number}.png"
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)
        cells.append(f"![{prompt}](docs/images/gallery/{path.name})<br>{prompt}")
    for first in range(0, len(cells), 4):
        print("| " + " | ".join(cells[first : first + 4]) + " |")
        if first == 0:
            print("|" + " --- |" * 4)


if __name__ == "__main__":
    main()
