"""Stage 2: CLIP on captioned pictures, for scenes also on their twins; its text tower becomes the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentdiff.core.errors import saving
from latentdiff.core.files import atomic
from latentdiff.core.images import to_images
from latentdiff.data.dataset import VALIDATION
from latentdiff.data.examples import Examples
from latentdiff.data.makers import Maker
from latentdiff.data.scene_set import Scenes
from latentdiff.diffusion import noise
from latentdiff.families.own import new_clip, new_tokenizer, seeded
from latentdiff.networks.clip import Clip, contrastive_loss, text_model_of
from latentdiff.networks.encoders.clip import TextEncoder, tokenize
from latentdiff.settings.config import Config
from latentdiff.stages.run import Run
from latentdiff.training.clip import CaptionedPicture, ClipStage
from latentdiff.training.order import Order
from latentdiff.training.run import run_stage

Tokenize = Callable[[Sequence[str]], Tensor]


def train_clip(run: Run[Config]) -> None:
    """Train both towers; save the text tower in transformers' format in `run/clip`, both as `run/model/clip`."""
    config, accelerator = run.config, run.accelerator
    tokenizer = new_tokenizer(config, run.data.training.all_captions())
    with seeded(config.seed):
        module = new_clip(config, len(tokenizer))
    pictures = run.data.training.pictures
    maker = pictures.maker if isinstance(pictures, Scenes) else None
    to_ids = partial(tokenize, tokenizer)
    stage = ClipStage(
        module,
        _captioned(run) if maker is None else partial(captioned_twins, config, maker),
        to_ids,
        contrastive_loss(accelerator.process_index, accelerator.num_processes),
    )
    report = partial(_report, config, maker, run.data.validation, to_ids, accelerator.device, module)
    start = run.start("clip")
    run_stage(accelerator, stage, config.clip.training, run.folder / "clip", report, start, run.interruption)
    if accelerator.is_main_process:
        with saving("CLIP", run.folder):
            with atomic(run.folder / "model" / "clip") as folder:
                module.save(folder)
            with atomic(run.folder / "clip") as folder:
                TextEncoder(tokenizer, text_model_of(module)).save(folder)
    accelerator.wait_for_everyone()


def captioned_twins(
    config: Config, maker: Maker, positions: range, purpose: str = "clip scene"
) -> list[CaptionedPicture]:
    """Scenes at even positions, and after each a twin that differs in one fact. The range begins and ends even."""
    pairs = []
    for position in range(positions.start // 2, positions.stop // 2):
        rng = noise.generator(config.seed, purpose, position)
        first = maker.scene(rng)
        scenes = (first, maker.twin(first, rng))
        states_all = rng.random() < 0.5  # the first caption states all facts, so it tells twins apart
        for scene in scenes:
            captions = maker.captions(scene)
            number = 0 if states_all else int(rng.integers(len(captions)))
            pairs.append((maker.picture(scene, config.image_size), captions[number]))
    return pairs


def _captioned(run: Run[Config]) -> Callable[[range], list[CaptionedPicture]]:
    """The user's captioned pictures, cropped to squares."""
    examples, config = run.data.training, run.config
    order = Order(config.seed, "clip", [np.arange(len(examples))])

    def batch_of(positions: range) -> list[CaptionedPicture]:
        keys = [order.key(position) for position in positions]
        return [(_square(config, examples, *key), examples.caption(*key)) for key in keys]

    return batch_of


def _square(config: Config, examples: Examples, row: int, epoch: int) -> np.ndarray:
    """A square picture, in colour even if the model draws grey."""
    return examples.pictures.pixels(row, examples.view(row, epoch), (config.image_size, config.image_size))


@torch.no_grad()
def _report(
    config: Config,
    maker: Maker | None,
    validation: Examples,
    to_ids: Tokenize,
    device: torch.device,
    module: Clip,
    step: int,
) -> dict[str, float]:
    """The validation loss, and how often CLIP picks the right caption: of all, and of a picture's and its twin's."""
    module.eval()
    if maker is not None:
        pairs = captioned_twins(config, maker, range(2 * VALIDATION), "clip validation")
    else:
        rows = range(min(len(validation), 2 * VALIDATION))
        pairs = [(_square(config, validation, row, 0), validation.caption(row, 0)) for row in rows]
    pictures, captions = zip(*pairs, strict=True)
    images = to_images(np.stack(pictures)).to(device)
    image_features, text_features, scale = module(images, to_ids(captions).to(device))
    similarity = image_features @ text_features.T
    rows_of = torch.arange(len(images), device=device)
    numbers = {
        "validation_loss": float(contrastive_loss()(image_features, text_features, scale)),
        "top_1": float((similarity.argmax(1) == rows_of).float().mean()),
    }
    if maker is not None:
        own, twin = similarity[rows_of, rows_of], similarity[rows_of, rows_of ^ 1]
        numbers["top_1_of_twins"] = float((own > twin).float().mean())
    return numbers
