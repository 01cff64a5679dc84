"""Learnt words (Gal et al. 2022): a file of embeddings, and the tokens that stand for them.

A file holds {word: (D,) or (n, D)}. Other files have no word, which is then the file's name: `emb_params` and
`string_to_param.*` of A1111; `clip_l` and `clip_g`, the vectors of each text encoder, of Stable Diffusion XL. A word of
n vectors is n tokens: word, word_1, word_2, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.two_clips import TwoTextEncoders

_OF_TWO = ("clip_l", "clip_g")
_NAMELESS = ("emb_params", "string_to_param.*", "string_to_param", "*")


@dataclass(frozen=True)
class Words:
    """Words that fit their text encoder and are not in it yet: (encoder, word, vectors), and their names."""

    names: list[str]
    each: list[tuple[TextEncoder, str, Tensor]]

    def add(self) -> None:
        """Add them to their text encoders."""
        for encoder, name, vectors in self.each:
            _teach(encoder, name, vectors)


def words_of(
    state: dict[str, Tensor], file: Path, text_encoder: TextEncoder | TwoTextEncoders, word: str | None = None
) -> Words:
    """The words of a file, {name: vectors}, for a text encoder, which is not changed yet.

    word: another name for the only word. Raises ModelError if the vectors do not fit or a word exists already.
    """
    encoders = text_encoder.encoders
    words = _by_word(state, file.stem, encoders, file)
    if word is not None and len(words) > 1:
        raise ModelError(f"another name requires a file with one word ({file} has {len(words)})")
    each = [(e, word or name, own) for name, vectors in words.items() for e, own in zip(encoders, vectors, strict=True)]
    for encoder, name, vectors in each:
        _check(encoder, name, vectors, file)
    tokens = [token for encoder, name, vectors in each if encoder is encoders[0] for token in _tokens(name, vectors)]
    if len(set(tokens)) < len(tokens) or any(len({len(v) for v in vectors}) > 1 for vectors in words.values()):
        raise ModelError(f"two words share tokens, or the text encoders have different numbers of vectors ({file})")
    return Words([word] if word is not None else list(words), each)


def _by_word(
    state: dict[str, Tensor], stem: str, encoders: Sequence[TextEncoder], file: Path
) -> dict[str, list[Tensor]]:
    """Each word's vectors (n, D), one array for each encoder."""
    if state.keys() & set(_OF_TWO):
        embeddings = {stem: _by_encoder(state, encoders, file)}
    elif len(encoders) == 1:
        nameless = next((key for key in _NAMELESS if key in state), None)
        named = state if nameless is None else {stem: state[nameless]}
        embeddings = {word: [vectors] for word, vectors in named.items()}
    else:
        raise ModelError(
            f"two text encoders require embeddings clip_l and clip_g ({file}: {', '.join(sorted(state)[:3])})"
        )
    if not embeddings:
        raise ModelError(f"the file is empty ({file})")
    if any(vectors.ndim not in (1, 2) or not vectors.numel() for each in embeddings.values() for vectors in each):
        raise ModelError(f"embeddings must have the shape (D,) or (n, D) ({file})")
    return {word: [vectors.reshape(-1, vectors.shape[-1]) for vectors in each] for word, each in embeddings.items()}


def _by_encoder(state: dict[str, Tensor], encoders: Sequence[TextEncoder], file: Path) -> list[Tensor]:
    """The vectors of each encoder, zeros where the file has none. Raises ModelError for vectors of another encoder."""
    names = _OF_TWO[: len(encoders)]
    if other := sorted(state.keys() - set(names)):
        raise ModelError(f"{other[0]} belongs to a text encoder that this model does not have ({file})")
    first = next(iter(state.values()))
    count = first.shape[0] if first.ndim > 1 else 1
    widths = [encoder.model.get_input_embeddings().weight.shape[1] for encoder in encoders]
    return [state.get(name, first.new_zeros(count, width)) for name, width in zip(names, widths, strict=True)]


def _tokens(word: str, vectors: Tensor) -> list[str]:
    """The tokens of a word, in lower case like all text in CLIP's tokenizer."""
    word = word.lower()
    return [word, *(f"{word}_{number}" for number in range(1, len(vectors)))]


def _check(encoder: TextEncoder, word: str, vectors: Tensor, file: Path) -> None:
    """Check a word before the encoder changes. Raises ModelError."""
    width = encoder.model.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != width:
        raise ModelError(f"{word} has vectors of {vectors.shape[1]} numbers, this model's have {width} ({file})")
    if not (vectors.is_floating_point() and bool(torch.isfinite(vectors).all())) or len(vectors) >= encoder.length:
        raise ModelError(f"{word} must have finite vectors, and fewer than a prompt has tokens ({file})")
    if not word.strip() or word != word.strip():
        raise ModelError(f"{word!r} is not a word ({file}). Give another name")
    known = encoder.tokenizer.get_vocab()
    if taken := [token for token in _tokens(word, vectors) if token in known]:
        raise ModelError(f"the word {taken[0]!r} exists already ({file}). Give another name")


@torch.no_grad()
def _teach(encoder: TextEncoder, word: str, vectors: Tensor) -> None:
    tokens = _tokens(word, vectors)
    _remember(encoder, tokens)
    first = len(encoder.model.get_input_embeddings().weight)
    with torch.random.fork_rng(devices=[]):  # the new rows are drawn before they are filled
        encoder.model.resize_token_embeddings(first + len(tokens), mean_resizing=False)
    grown = encoder.model.get_input_embeddings().weight
    ids = encoder.tokenizer.convert_tokens_to_ids(tokens)
    grown[ids] = vectors.to(grown)


def _remember(encoder: TextEncoder, tokens: Sequence[str]) -> None:
    encoder.tokenizer.add_tokens(list(tokens))
    getattr(encoder.model, "text_model", encoder.model).eos_token_id = encoder.reader.end  # not the largest id


class LearntEmbedding(nn.Module):
    """A text encoder's token embedding whose rows from id `first` on are trained; the others are frozen."""

    def __init__(self, known: nn.Embedding, vectors: Tensor, first: int):
        super().__init__()
        self.known, self.vectors, self._first = known.requires_grad_(False), nn.Parameter(vectors), first

    @property
    def weight(self) -> Tensor:
        """All rows, like the weight of an embedding."""
        return torch.cat([self.known.weight[: self._first], self.vectors.to(self.known.weight)])

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D)."""
        known = self.known(ids.clamp(max=self._first - 1))
        learnt = nn.functional.embedding((ids - self._first).clamp(min=0), self.vectors).to(known.dtype)
        return torch.where((ids >= self._first)[..., None], learnt, known)


@torch.no_grad()
def begin_word(
    text_encoder: TextEncoder | TwoTextEncoders, word: str, initial: str, count: int
) -> dict[str, nn.Parameter]:
    """Add a word of `count` vectors, copies of the initial words' in turn; returns the embeddings to be trained.

    Their keys are those of a file of embeddings. Raises ConfigError if the word exists already or the initial words do
    not.
    """
    embeddings: dict[str, nn.Parameter] = {}
    for name, encoder in zip(_keys(word, text_encoder), text_encoder.encoders, strict=True):
        encoder.requires_grad_(False)
        embedding = encoder.model.get_input_embeddings()
        ids = encoder.tokenizer(initial, add_special_tokens=False, truncation=False, verbose=False).input_ids
        if not ids:
            raise ConfigError("the initial words are empty. Name a similar thing, like --initial dog")
        begun = embedding.weight[[ids[number % len(ids)] for number in range(count)]]
        try:
            _check(encoder, word, begun, Path("--token"))
        except ModelError as error:
            raise ConfigError(str(error)) from None
        tokens = _tokens(word, begun)
        _remember(encoder, tokens)
        learnt = LearntEmbedding(embedding, begun.float().clone(), encoder.tokenizer.convert_tokens_to_ids(tokens[0]))
        encoder.model.set_input_embeddings(learnt)
        embeddings[name] = learnt.vectors
    return embeddings


def _keys(word: str, text_encoder: TextEncoder | TwoTextEncoders) -> Sequence[str]:
    return (word,) if len(text_encoder.encoders) == 1 else _OF_TWO
