"""Prompts: weights, breaks, chunks; what they become in the context."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.core.errors import ConfigError
from latentdiff.networks.encoders.clip import TextEncoder, clip_tokenizer
from latentdiff.networks.encoders.prompt import Chunk, Piece, Prompt, Style, chunks, notes_on, parse

PLAIN = Style(weights=False)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77
    )
    return TextEncoder(clip_tokenizer(77), CLIPTextModel(config)).eval()


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red circle", [("a red circle", 1.0)]),
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("a ((red)) circle", [("a ", 1.0), ("red", 1.1 * 1.1), (" circle", 1.0)]),
        ("a (red:1.3) circle", [("a ", 1.0), ("red", 1.3), (" circle", 1.0)]),
        ("a (red: .5 )", [("a ", 1.0), ("red", 0.5)]),
        ("[dull] red", [("dull", 1 / 1.1), (" red", 1.0)]),
        ("(a [b:1] c:2)", [("a ", 2.0), ("b:1", 2 / 1.1), (" c", 2.0)]),
        ("(((a:2) b:3):0.5)", [("a", 2 * 3 * 0.5), (" b", 3 * 0.5)]),
        (r"\(literal\) \[too\] \\", [(r"(literal) [too] " + "\\", 1.0)]),
        ("ratio 16:9", [("ratio 16:9", 1.0)]),
        ("(ratio 16:9, wide:1.2)", [("ratio 16:9, wide", 1.2)]),
        ("(red:1.0) circle", [("red circle", 1.0)]),
        ("back\\slash", [("back\\slash", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red", [("a (red", 1.0)]),
        ("a red)", [("a red)", 1.0)]),
        ("a [red)", [("a [red)", 1.0)]),
        ("a (red]", [("a (red]", 1.0)]),
        ("a cat :)", [("a cat :)", 1.0)]),
        ("1) a cat, 2) a dog", [("1) a cat, 2) a dog", 1.0)]),
        ("a (red:1.3", [("a (red:1.3", 1.0)]),
        ("red:1.3) circle", [("red:1.3) circle", 1.0)]),
        ("((red) circle", [("(", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("(a [b) c", [("(a [b) c", 1.0)]),
        ("[a (red) b", [("[a ", 1.0), ("red", 1.1), (" b", 1.0)]),
        (":( (happy:1.2) :)", [(":", 1.0), (" ", 1.1), ("happy", 1.2 * 1.1), (" :", 1.1)]),
    ],
)
def test_pieces(prompt, pieces):
    (result,) = parse(prompt) or [[]]
    result = result or [Piece("", 1.0)]
    assert [piece.text for piece in result] == [text for text, _ in pieces]
    assert [piece.weight for piece in result] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(red:99)", "weights must be from -10 to 10"),
        ("((((red:9):9):9):9)", "weights must be from -10 to 10"),
        ("a cat <lora:ink:0.8>", "Name adapters by --lora"),
    ],
)
def test_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        parse(prompt)


@pytest.mark.parametrize(
    ("prompt", "notes"),
    [
        ("a (red:1.2) [dull] circle", ()),
        ("a cat :)", (") without a partner is read as a character",)),
        ("1) a (cat", (") ( without a partner is read as a character",)),
        (r"a cat :\) \[a|b\]", ()),
        ("[cat:dog:0.5]", ("'[cat:dog:0.5]' is read as text: prompt editing is not supported",)),
        ("[dog:10]", ("'[dog:10]' is read as text: prompt editing is not supported",)),
        ("[cat|dog]", ("'[cat|dog]' is read as text: alternation is not supported",)),
        ("a cat AND a dog", ("'AND' is read as text: AND between prompts is not supported",)),
        ("a SAND castle and a dog", ()),
    ],
)
def test_notes(prompt, notes):
    assert notes_on(prompt) == notes


def test_breaks_and_chunks():
    def ids_of(text):
        return [len(word) for word in text.split()]

    assert chunks("a bb BREAK (ccc:2) d", Style(), ids_of, 3) == [Chunk([1, 2], [1, 1]), Chunk([3, 1], [2, 1])]
    assert chunks("a bb ccc d", Style(), ids_of, 3) == [Chunk([1, 2, 3], [1, 1, 1]), Chunk([1], [1])]
    assert chunks("", Style(), ids_of, 3) == [Chunk([], [])]
    assert chunks("(a) BREAK b", PLAIN, ids_of, 4) == [Chunk([3, 5, 1], [1, 1, 1])]
    assert len(chunks("UNBREAKABLE", Style(), ids_of, 3)) == 1


def test_weight_one_is_no_weight(encoder):
    """To the bit, on one word, on all, nested, and written as 1.0."""
    plain = encoder.encode(Prompt("a red circle above a blue square"))["tokens"]
    assert torch.equal(plain, encoder(encoder.tokenize(["a red circle above a blue square"]))["tokens"][0])
    for prompt in ("a (red:1.0) circle above a blue square", "(a red circle above a (blue:1) square:1)"):
        assert torch.equal(encoder.encode(Prompt(prompt))["tokens"], plain)
    assert torch.equal(encoder.encode(Prompt("a red circle above a blue square", PLAIN))["tokens"], plain)


def test_brackets_as_text(encoder):
    text = "a (red:1.5) circle [dull] BREAK"
    literal = encoder(encoder.tokenize([text]))["tokens"][0]
    assert torch.equal(encoder.encode(Prompt(text, PLAIN))["tokens"], literal)
    assert not torch.equal(encoder.encode(Prompt(text))["tokens"], literal)


def test_weights_move_away_from_the_empty_prompt(encoder):
    """c_empty + w (c - c_empty) at the word alone: 0 leaves nothing of it, and it is linear in w."""
    empty, plain = encoder.encode(Prompt(""))["tokens"], encoder.encode(Prompt("a red circle"))["tokens"]
    for weight in (0.0, 0.5, 2.0, -1.0):
        result = encoder.encode(Prompt(f"a (red:{weight}) circle"))["tokens"]
        torch.testing.assert_close(result[2], empty[2] + weight * (plain[2] - empty[2]))
        others = [index for index in range(77) if index != 2]
        assert torch.equal(result[others], plain[others])


def test_all_of_a_long_prompt_is_read(encoder):
    """200 words: three chunks, each encoded as if it were alone; changing the last word changes the context."""
    words = [f"{color} circle" for color in ("red", "green", "blue", "pink")] * 25
    prompt = " ".join(words)
    assert encoder.read(prompt)[:3] == (202, 3, 0)
    context = encoder.encode(Prompt(prompt))["tokens"]
    assert context.shape == (3 * 77, 32)
    first = " ".join(prompt.split()[:75])
    torch.testing.assert_close(context[:77], encoder.encode(Prompt(first))["tokens"])
    last = " ".join(prompt.split()[150:])
    torch.testing.assert_close(context[154:], encoder.encode(Prompt(last))["tokens"])
    other = prompt.removesuffix("circle") + "square"
    assert (encoder.encode(Prompt(other))["tokens"] - context).abs().max() > 1e-3
    cut = Style(chunked=False)
    assert encoder.read(prompt, cut)[:3] == (202, 1, 125)
    assert torch.equal(encoder.encode(Prompt(prompt, cut))["tokens"], encoder(encoder.tokenize([prompt]))["tokens"][0])


def test_chunks_are_filled_up_with_empty_ones(encoder):
    context = encoder.encode(Prompt("a red circle", chunks=3))["tokens"]
    torch.testing.assert_close(context[77:154], encoder.encode(Prompt(""))["tokens"])
    torch.testing.assert_close(context[:77], encoder.encode(Prompt("a red circle"))["tokens"])
