"""Narrow the vocabulary of a model that was trained with CLIP's to the tokens of the words that it knows.

    python scripts/narrow_vocabulary.py MODEL OUT
    latentdiff convert OUT --to openvino

CLIP has 49,408 tokens, and a small model meets few of them in training. Known words keep their tokens, and a token its
row of the table, so that prompts of known words draw the same pictures. Other words are read in pieces.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from latentdiff.core.errors import ModelError
from latentdiff.families.card import known_words
from latentdiff.networks.encoders.clip import with_merges

DIGITS = "0123456789"
TABLE = "embeddings.token_embedding.weight"


def merges_of(words: list[str], tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    """The merges that make the tokens of these words, in the tokenizer's order."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [(first, second) for first, second in model["merges"]]
    rank = {pair: number for number, pair in enumerate(pairs)}
    ranks = set()
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while known := [(rank[pair], k) for k, pair in enumerate(pairwise(parts)) if pair in rank]:
            number, place = min(known)
            ranks.add(number)
            parts[place : place + 2] = ["".join(pairs[number])]
    return [pairs[number] for number in sorted(ranks)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    words = sorted(known_words(given.model))
    if not all(word.isascii() for word in words):
        raise ModelError("the words must be ASCII, each letter of which is a byte")
    old = CLIPTokenizer.from_pretrained(given.model / "tokenizer")
    new = with_merges(merges_of([*words, *DIGITS], old), old.model_max_length, str(old.pad_token))
    vocabulary = new.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert all(new.tokenize(word) == old.tokenize(word) for word in words)

    shutil.copytree(given.model, given.out)
    shutil.rmtree(given.out / "openvino", ignore_errors=True)  # its graphs belong to the whole table
    new.save_pretrained(given.out / "tokenizer")
    weights = given.out / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors[TABLE] = tensors[TABLE][old.convert_tokens_to_ids(tokens)].contiguous()
    save_file(tensors, weights, {"format": "pt"})
    ends = {"bos_token_id": new.bos_token_id, "eos_token_id": new.eos_token_id, "pad_token_id": new.pad_token_id}
    change(given.out / "text_encoder" / "config.json", vocab_size=len(tokens), **ends)
    clip = given.out / "clip" / "open_clip_config.json"
    if clip.is_file():
        config = json.loads(clip.read_text())
        config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokens)
        clip.write_text(json.dumps(config, indent=1) + "\n")
    print(f"{len(old):,} tokens before, {len(tokens):,} now")


def change(file: Path, **values: int) -> None:
    """Set values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


if __name__ == "__main__":
    main()
