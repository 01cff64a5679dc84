"""Prompts to conditions: CLIP's tokenizer and text transformer (Radford et al. 2021), from transformers.

The vocabulary is CLIP's own byte-pair encoding, which open_clip ships as a file, so no hub is needed, or one of the
same form that is learnt from captions.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import EMPTY, Chunk, Prompt, Reader, Reading, Style, check_clip_skip, weighted
from latentdiff.networks.encoders.t5 import tokenizer_json
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced

Tokenizer = CLIPTokenizer
START, END = "<|startoftext|>", "<|endoftext|>"


class TextEncoder(nn.Module):
    """Token ids (B, L) -> conditions `tokens` (B, L, D): the last hidden states after the final layer norm.

    penultimate: the hidden states before the last layer, without the norm, which SDXL reads.
    """

    kind = "clip"

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        *,
        penultimate: bool = False,
    ):
        super().__init__()
        self.tokenizer, self.model, self.penultimate, self._turn = tokenizer, model, penultimate, Turn()
        self.layers = int(model.config.num_hidden_layers) - penultimate  # that can be read

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, length), cut and padded with the end token like Stable Diffusion's."""
        with self._turn:  # the tokenizer remembers its last truncation and padding
            if not self.learnt_words:
                return tokenize(self.tokenizer, prompts)
            chunks = [Chunk(self._ids_of(prompt)[: self.length - 2], []) for prompt in prompts]
            return torch.from_numpy(self.reader.ids(chunks))

    @property
    def encoders(self) -> list[TextEncoder]:
        """The encoder alone; TwoTextEncoders has two."""
        return [self]

    @property
    def texts(self) -> dict[str, TextEncoder]:
        """The encoder alone, by the name of its part."""
        return {"text_encoder": self}

    def options(self) -> dict[str, Any]:
        """Arguments of its reading class beside the encoders, as JSON values."""
        return {}

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return int(self.tokenizer.model_max_length)

    def forward(self, ids: Tensor) -> Conditions:
        """The conditions of token ids; an encoder with a projection also gives `pooled` (B, P)."""
        output = self.model(ids, output_hidden_states=self.penultimate)
        tokens = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        return conditions_of(tokens, getattr(output, "text_embeds", None))

    def use_plain_attention(self) -> None:
        """Compute attention as two matrix products and a softmax, for training on a CPU: see UNet."""
        self.model.set_attn_implementation("eager")

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """A block without `use_plain_attention`: outputs equal those of a loaded encoder to the bit."""
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder. Raises ConfigError for weights that are too large."""
        with self._turn:
            return self.reader.read(prompt, style)

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Conditions:
        """`tokens` (n L, D) of a prompt in n chunks; empty chunks are appended up to `prompt.chunks`.

        A word of weight w moves the tokens w times as far from the empty prompt's as without a weight
        (`prompt.weighted`). Sizes are ignored: only Stable Diffusion XL reads them.
        """
        check_clip_skip(prompt.style, self.layers)
        with self._turn:
            reader = self.reader
            chunks = reader.padded(prompt.text, prompt.style, prompt.chunks)
            hidden, pooled = self._hidden(chunks, prompt.style)
            weights = reader.weights(chunks)
            if (weights != 1).any():
                empty, _ = self._hidden([EMPTY], prompt.style)
                hidden = weighted(hidden, empty, torch.from_numpy(weights).to(hidden))
            return conditions_of(hidden.flatten(0, 1), None if pooled is None else pooled[0])

    @torch.no_grad()
    def pooled(self, prompt: Prompt) -> Tensor:
        """The pooled text (D,) of a prompt's first chunk: the last hidden state of its end, without weights."""
        with self._turn:
            ids = torch.from_numpy(self.reader.ids(self.reader.padded(prompt.text, prompt.style, 1)[:1]))
            place = self.model.device
            pooled: Tensor = self.model(ids if place.type == "meta" else ids.to(place)).pooler_output[0]
            return pooled

    def outputs(self, ids: Tensor) -> Any:
        """The text model's outputs for token ids (n, L), with all hidden states."""
        return self.model(ids, output_hidden_states=True, return_dict=True)

    def hidden(self, outputs: Any, skipped: int = 0) -> Tensor:
        """The hidden states (n, L, D) among the outputs, with that many layers left out."""
        states = outputs.hidden_states
        if self.penultimate:
            return states[-2 - skipped]
        return self.model.final_layer_norm(states[-1 - skipped]) if skipped else outputs.last_hidden_state

    def _hidden(self, chunks: Sequence[Chunk], style: Style) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, L, D) of chunks, and the pooled text (n, P) if the encoder has a projection."""
        ids, place = torch.from_numpy(self.reader.ids(chunks)), self.model.device
        if place.type != "meta":  # offloaded layers fetch their input
            ids = ids.to(place)
        outputs = self.outputs(ids)
        return self.hidden(outputs, style.clip_skip or 0), getattr(outputs, "text_embeds", None)

    @property
    def reader(self) -> Reader:
        """Its vocabulary, with the learnt words."""
        start, end, pad = (self.tokenizer.convert_tokens_to_ids(t) for t in (START, END, self.tokenizer.pad_token))
        return Reader(self._ids_of, start, end, pad, self.length)

    def _ids_of(self, text: str) -> list[int]:
        """The ids of a text. A learnt word of several vectors becomes word, word_1, word_2, ..."""
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        learnt = self.learnt_words
        words = {index: word for word, index in learnt.items()}
        expanded: list[int] = []
        for index in ids:
            expanded.append(index)
            number = 1
            while index in words and (further := learnt.get(f"{words[index]}_{number}")) is not None:
                expanded.append(further)
                number += 1
        return expanded

    @property
    def learnt_words(self) -> dict[str, int]:
        """Words outside CLIP's vocabulary, with their ids."""
        return {word: index for word, index in self.tokenizer.added_tokens_encoder.items() if index > self._end}

    @property
    def _end(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(END))

    def tokenizer_json(self) -> str:
        """The tokenizer's file, without the padding and cutting of its last use."""
        return tokenizer_json(self.tokenizer)

    def traced(self, part: str) -> dict[str, Traced]:
        """Token ids (n, L) -> the hidden states for each clip_skip, then the pooled text."""

        def function(ids: Tensor) -> tuple[Tensor, ...]:
            output = self.outputs(ids)
            pooled = output.get("text_embeds")
            hidden = (self.hidden(output, skipped) for skipped in range(self.layers))
            return *hidden, output.pooler_output if pooled is None else pooled

        ids = torch.arange(self.length).expand(2, -1) % self.reader.end
        return {part: Traced(part, self.model, function, [{"ids": ids}, {"ids": ids[:1]}])}

    def facts(self) -> dict[str, Any]:
        """See Traceable. projects: whether the pooled text is one of the conditions."""
        reader, projects = self.reader, isinstance(self.model, CLIPTextModelWithProjection)
        numbers = {"length": reader.length, "start": reader.start, "end": reader.end, "pad": reader.pad}
        return {"kind": self.kind, "layers": self.layers, "projects": projects, **numbers}

    def save(self, directory: Path, suffix: str = "") -> None:
        """Write tokenizer/ and text_encoder/, or tokenizer_2/ and text_encoder_2/."""
        tokenizer, text_encoder = directory / f"tokenizer{suffix}", directory / f"text_encoder{suffix}"
        self.tokenizer.save_pretrained(tokenizer)
        # the same file again without white space, which is half of it
        (tokenizer / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")
        save_network(self.model, text_encoder)


def conditions_of(tokens: Tensor, pooled: Tensor | None = None) -> Conditions:
    """Conditions of a text; pooled is None for an encoder without a projection."""
    return Conditions({"tokens": tokens} | ({} if pooled is None else {"pooled": pooled}))


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, max_length)."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def clip_tokenizer(max_length: int, pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer, from the merges that open_clip ships; OpenCLIP's own models pad with "!", which has id 0."""
    return with_merges(_merges(), max_length, pad)


@cache
def _merges() -> list[tuple[str, str]]:
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [(first, second) for first, second in map(str.split, lines[1 : 49152 - 256 - 2 + 1])]


def learnt_tokenizer(captions: Iterable[str], merges: int, max_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learnt from captions (Sennrich et al. 2016), at most `merges`.

    It reads any text, because every byte is a word of it. Training is deterministic.
    """
    plain = with_merges([], max_length)
    learnt = plain.train_new_from_iterator(captions, len(plain) + merges, show_progress=False)
    pairs = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    return with_merges([(first, second) for first, second in pairs[:merges]], max_length)


def with_merges(merges: Sequence[tuple[str, str]], max_length: int, pad: str = END) -> CLIPTokenizer:
    """CLIP's vocabulary: 256 bytes, the same ending a word, one entry a merge, start and end."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=list(merges),
        model_max_length=max_length,
        pad_token=pad,
    )
