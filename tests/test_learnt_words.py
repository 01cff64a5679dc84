"""Textual inversion in training: rows behind a frozen embedding, written as every tool reads them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.formats.words_file import save_word
from latentdiff.networks.adapters.words import LearntEmbedding, begin_word
from latentdiff.networks.encoders.prompt import Prompt

from .stable_diffusion import load


def test_an_embedding_with_rows_of_its_own():
    """As one embedding of all rows; the gradient reaches the new ones alone, and padding behind them is not read."""
    known = nn.Embedding(12, 5)
    vectors = torch.randn(2, 5)
    learnt = LearntEmbedding(known, vectors.clone(), first=10)
    whole = torch.cat([known.weight[:10], vectors])
    ids = torch.tensor([[0, 9, 10, 11], [10, 10, 3, 11]])
    assert torch.equal(learnt(ids), nn.functional.embedding(ids, whole))
    assert torch.equal(learnt.weight, whole)
    learnt(ids).sum().backward()
    assert known.weight.grad is None
    assert torch.equal(learnt.vectors.grad, torch.tensor([[3.0], [2.0]]).expand(2, 5))


@pytest.mark.parametrize("family", ["1", "XL"])
@torch.no_grad()
def test_a_word_begins_as_known_ones(folders, family):
    """Of three vectors from two words in turn: `<ink>` reads as "old castle old" does."""
    pipe = load(folders[family])
    expected = pipe.model.encoder(pipe.model.encoder.tokenize(["a old castle old hill"]))
    vectors = begin_word(pipe.model.encoder, "<ink>", "old castle", 3)
    assert list(vectors) == (["<ink>"] if family == "1" else ["clip_l", "clip_g"])
    trained = [p for p in pipe.model.encoder.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in vectors.values()}
    ids = pipe.model.encoder.tokenize(["a <ink> hill"])
    torch.testing.assert_close(pipe.model.encoder(ids)["tokens"], expected["tokens"])
    assert pipe.model.encoder.read("a <ink> hill").tokens == 2 + 5


@pytest.mark.parametrize("family", ["1", "XL"])
@torch.no_grad()
def test_what_is_learnt_is_read_everywhere(folders, tmp_path, family):
    pipe = load(folders[family])
    vectors = begin_word(pipe.model.encoder, "<ink>", "castle", 2)
    for parameter in vectors.values():
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    expected = pipe.model.encoder.encode(Prompt("a <ink> hill"))["tokens"]
    path = save_word(vectors, tmp_path, "<ink>")
    assert path.name == ("learned_embeds.safetensors" if family == "1" else "<ink>.safetensors")
    again = load(folders[family])
    assert again.load_textual_inversion(path) == ["<ink>"]
    torch.testing.assert_close(again.model.encoder.encode(Prompt("a <ink> hill"))["tokens"], expected)
    if family == "1":
        theirs = StableDiffusionPipeline.from_pretrained(folders["1"])
        theirs.load_textual_inversion(tmp_path, weight_name=path.name)
        ids = theirs.tokenizer(theirs.maybe_convert_prompt("a <ink> hill", theirs.tokenizer)).input_ids
        assert ids[2:4] == [49408, 49409]
        read = theirs.text_encoder.get_input_embeddings()(torch.tensor(ids))
        torch.testing.assert_close(read[2:4], load_file(path)["<ink>"])


@pytest.mark.parametrize(
    ("word", "initial", "count", "message"),
    [
        ("dog", "cat", 1, "the word 'dog' exists already"),
        ("<ink>", "", 1, "the initial words are empty"),
        ("<ink>", "cat", 77, "must have finite vectors, and fewer"),
        (" ", "cat", 1, "is not a word"),
    ],
)
def test_refused_words(folders, word, initial, count, message):
    with pytest.raises(ConfigError, match=message):
        begin_word(load(folders["1"]).model.encoder, word, initial, count)
