"""An IP-Adapter for the default model, by its own CLIP: how often a drawn picture leads back to the shown one.

    python scripts/control.py make FOLDER --pictures 3000
    latentdiff finetune scenes-64 FOLDER/train -o RUN --method ip-adapter --steps 3000
    python scripts/image_prompt.py FOLDER/test RUN/ip_adapter [--pictures 100]

Each of the test pictures, which were not trained on, is shown to the model with the empty prompt. The test
pictures nearest to the drawn one are found by the distance of pixels and colours, which shares nothing with the model,
and by the model's CLIP. Printed are the shares in which the first, and one of the first five, is the shown picture,
with standard errors; then the same for pictures drawn with the empty prompt alone. By chance they are 1 and 5
of N.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image


def features_of(pictures: np.ndarray) -> np.ndarray:
    """Pictures made small, and their histograms of colours, (N, F)."""
    small, histograms = [], []
    for picture in pictures:
        little = Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)
        small.append(np.asarray(little, float).ravel() / 255)
        counts, _ = np.histogramdd(picture.reshape(-1, 3), bins=(4, 4, 4), range=[(0, 256)] * 3)
        histograms.append(counts.ravel() / counts.sum())
    return np.concatenate([np.stack(small) / 16, np.stack(histograms)], 1)


def by_clip(pipe, pictures: np.ndarray) -> np.ndarray:
    """Unit embeddings of the model's CLIP, (N, E)."""
    from latentdiff.core.images import to_images
    from latentdiff.families.clip import load_own_scorer

    scorer = load_own_scorer(pipe.card.folder)
    return scorer.images(to_images(pictures)).detach().numpy()


def say(what: str, image: np.ndarray, view: np.ndarray) -> None:
    distances = np.square(image[:, None] - view[None]).sum(-1)
    ranks = (distances < distances.diagonal()[:, None]).sum(1)
    texts = []
    for most in (1, 5):
        share = (ranks < most).mean()
        texts.append(f"in the first {most}: {share:.3f} +- {math.sqrt(share * (1 - share) / len(ranks)):.3f}")
    print(f"{what}: {', '.join(texts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--output", type=Path, help="a sheet: pictures that are shown, and what is drawn")
    given = parser.parse_args()
    from latentdiff import LatentDiffusionPipeline

    lines = [json.loads(line) for line in (given.folder / "metadata.jsonl").read_text().splitlines()][: given.pictures]
    view = np.stack([np.asarray(Image.open(given.folder / line["file_name"]).convert("RGB")) for line in lines])
    pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", device="cpu", runtime="torch")
    free = np.concatenate([pipe("", seed=row, output_type="uint8").images for row in range(len(view))])
    pipe.load_ip_adapter(given.adapter)
    image = np.concatenate(
        [pipe("", seed=row, ip_adapter_image=p, output_type="uint8").images for row, p in enumerate(view)]
    )
    for name, images in (("shown", image), ("not shown", free)):
        say(f"{name}, by pixels and colours", features_of(images), features_of(view))
        say(f"{name}, by CLIP", by_clip(pipe, images), by_clip(pipe, view))
    if given.output is not None:
        sheet = np.concatenate([np.concatenate(list(each[:16]), 1) for each in (view, image, free)])
        Image.fromarray(sheet).save(given.output)


if __name__ == "__main__":
    main()
