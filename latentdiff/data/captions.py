"""A picture's training prompt: one of its captions, its tags in a new order, in a template with a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CaptionRule:
    """How captions become the text encoder's input.

    `choice` takes the first of several captions or a random one; `shuffle_tags` puts all but the first `keep_tags`
    of the comma-separated tags in a random order; then one of the `templates` ("a photo of {}") and the `prefix`.
    An empty caption stays empty, since it is the unconditional one.
    """

    choice: str = "random"
    shuffle_tags: bool = False
    keep_tags: int = 0
    templates: tuple[str, ...] = ("{}",)
    prefix: str = ""

    def of(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """The prompt of one sample in one epoch. The number of draws does not depend on the settings."""
        which, template, order = rng.random(), rng.random(), rng.integers(2**63)
        caption = captions[int(which * len(captions)) if self.choice == "random" else 0]
        if self.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
            kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
            shuffled = np.random.Generator(np.random.Philox(int(order))).permutation(len(others))
            caption = ", ".join([*kept, *(others[index] for index in shuffled)]) or caption
        return self._framed(caption, self.templates[int(template * len(self.templates))])

    def possible(self, captions: Sequence[str]) -> list[str] | None:
        """Everything that `of` can return, or None if that includes every order of the tags."""
        if self.shuffle_tags:
            return None
        chosen = captions if self.choice == "random" else captions[:1]
        return list(dict.fromkeys(self._framed(caption, frame) for caption in chosen for frame in self.templates))

    def _framed(self, caption: str, template: str) -> str:
        return self.prefix + template.replace("{}", caption) if caption else ""
