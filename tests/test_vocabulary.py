"""The words that a model was trained on: in its folder, and named where a prompt has others."""

import shutil
from pathlib import Path

import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ModelError
from latentdiff.core.vocabulary import narrow, seen_things, unseen, words_of, words_of_one_thing
from latentdiff.data.dataset import open_data
from latentdiff.families.card import known_words
from latentdiff.families.convert import convert_folder
from latentdiff.settings.config import load_config

from .conftest import ROOT


def test_words_are_runs_of_letters():
    assert words_of(["A red_apple, 3 Äpfel (cat:1.2)", "don't"]) == {"a", "red", "apple", "äpfel", "cat", "don", "t"}
    assert unseen("A (Cat:1.2) BREAK on a cat, a dog break", {"a", "on"}) == ["cat", "dog", "break"]


def test_things_that_training_never_drew_are_not_listed():
    things = {"flags": ("flag of Sark",), "food": ("red apple", "Red pepper (hot)")}
    assert seen_things(things, {"flag", "of", "red", "apple"}) == {"food": ("red apple",)}


def test_words_of_one_thing():
    """A word in texts about one thing alone is that thing's; its own name, and words of several, are nobody's."""
    captions = {"ping pong": ["ping pong", "table", "ball"], "soccer": ["soccer", "ball"], "Tea": ["tea", "hot"]}
    of_one = words_of_one_thing(captions)
    assert of_one == {"ping": "ping pong", "pong": "ping pong", "table": "ping pong", "hot": "Tea"}
    assert narrow("A castle on a Table, table", of_one) == {"table": "ping pong"}
    assert narrow("a ping pong table and hot tea", of_one) == {}
    assert narrow("three Ping Pongs", of_one) == {}
    assert narrow("two french flies", {"french": "french fly", "fly": "french fly"}) == {}
    assert narrow("hot steak BREAK", of_one | {"break": "Tea"}) == {"hot": "Tea"}, "a name inside a word is none"


def test_a_model_knows_its_captions(tiny_model):
    """Its folder has the words of the captions that its own config trains on."""
    training = open_data(load_config(ROOT / "configs" / "scenes-tiny.toml")).training
    assert known_words(tiny_model) == dict.fromkeys(training.words(), "")


@pytest.mark.slow
def test_the_default_model_knows_its_captions():
    """The file that is shipped has the words of the captions that its own config trains on."""
    training = open_data(load_config(ROOT / "configs" / "scenes-64.toml", ["data.count=5000"])).training
    assert known_words(ROOT / "assets" / "scenes-64") == dict.fromkeys(training.words(), "")


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_words_that_it_has_never_seen_are_named(runtime):
    pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime=runtime, device="cpu")
    options = {"num_inference_steps": 1, "negative_prompt": "a blue smog", "guidance_scale": 2.0}
    assert pipe("a sofa on a hill", **options).notes == [
        "scenes-64 has never seen: sofa, hill",
        "scenes-64 has never seen: smog",
    ]
    assert not pipe("two blue stars above a ring", num_inference_steps=1).notes


def test_models_say_nothing_of_words_they_do_not_list(tiny_model, tmp_path):
    """A folder without the list, and a model with an adapter, which may know more words."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert {"red", "circle"} <= known_words(folder).keys()
    options = {"prompt": "a cat", "num_inference_steps": 1}
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert [note.partition(" has ")[2] for note in pipe(**options).notes] == ["never seen: cat"]
    pipe.save_pretrained(tmp_path / "again")
    assert known_words(tmp_path / "again") == known_words(folder)
    (folder / "words.txt").write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(ModelError, match=r"words\.txt"):
        LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(ModelError, match=r"words\.txt"):
        convert_folder(folder, tmp_path / "half", torch.float16)
    for text in ("\ufeffA\r\nCat\r\n", " a cat\n\n"):
        (folder / "words.txt").write_bytes(text.encode())
        assert known_words(folder) == {"a": "", "cat": ""}
    (folder / "words.txt").unlink()
    assert not LatentDiffusionPipeline.from_pretrained(folder, device="cpu")(**options).notes


def test_words_known_from_one_thing_alone_are_named(tiny_model, tmp_path):
    """The list in the folder says of which thing. A copy of the model keeps it."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "words.txt").write_text("a\non\ncircle\nping\tping pong\nPong\tping pong\ntable\tping pong\n")
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    name = pipe.card.name
    assert pipe("a circle on a table", num_inference_steps=1).notes == [
        f"{name} has seen only in captions of one thing: table (ping pong)"
    ]
    assert not pipe("a ping pong table on a circle", num_inference_steps=1).notes
    pipe.save_pretrained(tmp_path / "again")
    assert known_words(tmp_path / "again") == known_words(folder) | {"pong": "ping pong"}
