"""What the autoencoder makes of a picture: each channel of its latents, the picture decoded, and the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentdiff.core.arrays import to_numpy
from latentdiff.core.images import luminance, to_uint8
from latentdiff.show.sheet import CELL, Sheet, figure, place

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

TEXT = (
    "The picture; what the decoder makes of its latents; their difference, {factor} times as large, on grey. Below, "
    "each channel of the latents from {low:.1f} (black) to {high:.1f} (white), with its mean and standard deviation. "
    "{pixels:,} values became {count:,}: {ratio:.1f} times fewer."
)
FACTOR = 4  # of the difference


def latents(pipe: LatentDiffusionPipeline, picture: np.ndarray) -> Sheet:
    """The latents of a picture, uint8 (H, W, 3), whose sides must be multiples of the model's."""
    encoded = pipe.encode(picture[None])
    back, channels = to_uint8(pipe.decode(encoded))[0], to_numpy(encoded)[0]
    encoded_picture = picture if back.shape[-1] == 3 else luminance(picture[None])[0]
    apart = np.clip(128 + FACTOR * (back.astype(int) - encoded_picture), 0, 255).astype(np.uint8)
    across = max(3, min(8, len(channels)))
    down = 1 + -(-len(channels) // across)
    fig = figure(CELL * across + 0.4, (CELL + 0.3) * down)
    axes = fig.subplots(down, across, squeeze=False)
    cells = iter(axes[1:].flat)
    for cell, (name, view) in zip(
        axes[0], (("picture", picture), ("decoded", back), ("difference", apart)), strict=False
    ):
        place(cell, view)
        cell.set_title(name, fontsize=8)
    low, high = float(channels.min()), float(channels.max())
    for number, channel in enumerate(channels):
        cell = next(cells)
        place(cell, channel, cmap="gray", vmin=low, vmax=high)
        cell.set_title(f"channel {number}\n{channel.mean():.2f} ± {channel.std():.2f}", fontsize=8)
    for cell in (*axes[0, 3:], *cells):
        cell.set_axis_off()
    counts = {"pixels": picture.size, "count": channels.size, "ratio": picture.size / channels.size}
    return Sheet(
        f"Latents by the autoencoder of {pipe.card.name}",
        TEXT.format(factor=FACTOR, low=low, high=high, **counts),
        fig,
    )
