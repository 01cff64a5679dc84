"""A new word for five pictures of one thing: is it drawn, and does its class still draw what it drew?

CLIP is the default model's own: the mean cosine of drawn pictures with the five. The class is read by the oracle, which
knows no CLIP: the share of "a red ring", "a blue ring", ... that is one ring of that colour and nothing else.

    python scripts/bench/subject.py pictures/*o_clock.png -- --method dreambooth --rank 16
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.decoding import decode
from latentdiff.core.images import to_images
from latentdiff.data import scenes
from latentdiff.data.transform import view
from latentdiff.evaluation import oracle


def training_views(paths: list[Path], side: int) -> np.ndarray:
    """The pictures as training sees them, uint8 (N, side, side, 3)."""
    return np.stack([view(decode(path.read_bytes()).pixels, (side, side)) for path in paths])


@torch.no_grad()
def likeness(pipe: LatentDiffusionPipeline, pictures: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """The mean cosine of each picture with those of the subject, by CLIP's image tower."""
    embedded, known = (pipe.painter.scorer.images(to_images(images)) for images in (pictures, subject))
    return (embedded @ known.T).mean(1).numpy()


def class_read_right(pipe: LatentDiffusionPipeline, shape: str, each: int) -> float:
    """The share of pictures of the class in every colour that show one such thing."""
    right = []
    for color in scenes.COLORS:
        pictures = pipe(f"a {color} {shape}", num_images_per_prompt=each, seed=0, output_type="uint8").images
        for picture in pictures:
            things = oracle.read(picture).things
            right.append([(thing.shape, thing.color) for thing in things] == [(shape, color)])
    return float(np.mean(right))


def taught(model: str | None, folder: Path) -> LatentDiffusionPipeline:
    """The model with what was learnt."""
    if (folder / "model").is_dir():
        return LatentDiffusionPipeline.from_pretrained(folder / "model", device="cpu")
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    if (folder / "learned_embeds.safetensors").is_file():
        pipe.load_textual_inversion(folder)
    else:
        pipe.load_lora_weights(folder)
    return pipe


def main() -> None:
    """Before and after, of the same prompts and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--word", default="sks")
    parser.add_argument("--shape", default="ring", choices=scenes.SHAPES)
    parser.add_argument("--each", type=int, default=8, help="pictures of each prompt")
    parser.add_argument("--keep", type=Path, help="where the run and the pictures stay")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    folder = options.keep or Path(tempfile.mkdtemp())
    (folder / "subject").mkdir(parents=True, exist_ok=True)
    for path in options.pictures:
        shutil.copy(path, folder / "subject" / path.name)
    inversion = "textual-inversion" in words
    prompt = f"a {options.word}" if inversion else f"a {options.word} {options.shape}"
    more = ["--token", options.word, "--initial", options.shape] if inversion else ["--instance-prompt", prompt]
    more += [] if inversion else ["--class-prompt", f"a {options.shape}"]
    command = [sys.executable, "-m", "latentdiff", "finetune", options.model or "scenes-64", folder / "subject"]
    subprocess.run([*map(str, command), "-o", str(folder / "run"), *more, *words[cut + 1 :]], check=True)
    before = LatentDiffusionPipeline.from_pretrained(options.model, device="cpu")
    after = taught(options.model, folder / "run")
    side = before.card.size[0]
    subject = training_views(options.pictures, side)
    result = {}
    for name, pipe in (("before", before), ("after", after)):
        pipe.load_clip()
        image = pipe(prompt, num_images_per_prompt=4 * options.each, seed=0, output_type="uint8").images
        Image.fromarray(np.concatenate(list(image[:8]), 1)).save(folder / f"{name}.png")
        cosines = likeness(before if pipe.painter.scorer is None else pipe, image, subject)
        result[name] = {
            "the word's likeness to the subject": f"{cosines.mean():.3f} ± {cosines.std() / len(cosines) ** 0.5:.3f}",
            "the class read right": f"{class_read_right(pipe, options.shape, options.each):.3f}",
        }
    among = likeness(before if before.painter.scorer else after, subject, subject)
    result["the subject's pictures among each other"] = f"{among.mean():.3f}"
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
