"""Where each word of a prompt acts: the cross-attention of the U-Net, averaged over its layers and all steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.errors import ConfigError
from latentdiff.core.images import to_uint8
from latentdiff.show.sheet import CELL, Sheet, figure, place

if TYPE_CHECKING:
    from latentdiff.networks.encoders.clip import TextEncoder
    from latentdiff.pipeline import LatentDiffusionPipeline

TEXT = (
    "How much each place attends to each word, averaged over heads, layers and steps (Tang et al. 2023). All words "
    "have one scale of colours, from none to the largest value, {high:.3f}: a sum of 1 is shared by all tokens, and "
    "most of it goes to the start of the text."
)
MOST = 32  # words


def attention(pipe: LatentDiffusionPipeline, prompt: str, **settings: Any) -> Sheet:
    """A map of every word of the prompt over the picture that is drawn. settings: those of drawing.

    It requires torch, to which the pipeline changes. Raises ConfigError for a backbone without cross-attention.
    """
    from latentdiff.networks.backbones.maps import recorded_attention
    from latentdiff.networks.backbones.unet import UNet

    pipe.use_torch("attention maps")
    unet = pipe.model.backbone
    encoders: Any = getattr(pipe.model.encoder, "encoders", None)
    if not isinstance(unet, UNet) or not encoders:
        raise ConfigError("attention maps require a U-Net that reads a text")
    words = words_and_places(encoders[0], prompt)
    if not 1 <= len(words) <= MOST:
        raise ConfigError(f"attention maps require a prompt of 1 to {MOST} words (got {len(words)})")
    with recorded_attention(unet) as maps:
        last = list(pipe.stream(prompt, **settings))[-1]
    heat = maps.mean(*last.x.shape[-2:]).numpy()
    picture = to_uint8(pipe.decode(last.x[:1]))[0]
    heats = [(word, heat[places].mean(0)) for word, places in words]
    high = max(float(each.max()) for _, each in heats)
    across = min(8, len(heats) + 1)
    down = -(-(len(heats) + 1) // across)
    fig = figure(CELL * across, (CELL + 0.25) * down)
    axes = list(fig.subplots(down, across, squeeze=False).flat)
    place(axes[0], picture)
    axes[0].set_title("picture", fontsize=8)
    height, width = picture.shape[:2]
    for cell, (word, each) in zip(axes[1:], heats, strict=False):
        place(cell, _grey(picture))
        cell.imshow(each, cmap="inferno", vmin=0, vmax=high, alpha=0.75, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        cell.set_title(word, fontsize=8)
    for cell in axes[len(heats) + 1 :]:
        cell.set_axis_off()
    return Sheet(f"{pipe.card.name}: attention to “{prompt}”", TEXT.format(high=high), fig)


def words_and_places(encoder: TextEncoder, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt and the places of their tokens among those that the U-Net reads."""
    from latentdiff.networks.encoders.prompt import Style

    words: list[tuple[str, list[int]]] = []
    begins = True
    for number, chunk in enumerate(encoder.reader.chunks(prompt, Style())):
        tokens = encoder.tokenizer.convert_ids_to_tokens(chunk.ids)
        for index, token in enumerate(tokens):
            text = token.removesuffix("</w>")
            place = number * encoder.length + 1 + index
            if begins:
                words.append((text, [place]))
            else:
                words[-1] = (words[-1][0] + text, [*words[-1][1], place])
            begins = token != text
    return words


def _grey(picture: np.ndarray) -> np.ndarray:
    return picture.mean(-1, keepdims=True).astype(np.uint8)
