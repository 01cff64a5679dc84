"""Models and adapters by their names, and the history of all pictures."""

import base64
import io
import json
import os
import shutil
import sqlite3
import threading
import time
from dataclasses import replace
from datetime import datetime
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, ResourceError
from latentdiff.drawing.files import write_pictures
from latentdiff.drawing.request import LONGEST_PROMPT
from latentdiff.server import studio
from latentdiff.server.history import FILE, History, Search
from latentdiff.server.shelf import Adapter, Shelf, Wanted, without_tags

from .serving import PROMPT, Served, get
from .test_server import decoded

QUICK = {"num_inference_steps": 4, "seed": 7}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def opened(path):
    return LatentDiffusionPipeline.from_pretrained(path, device="cpu", runtime="torch")


@pytest.fixture(scope="module")
def places(tiny_model, tmp_path_factory):
    """A folder with another model, and one with an adapter."""
    models, adapters = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("adapters")
    shutil.copytree(tiny_model, models / "other")
    other = opened(models / "other")
    with torch.no_grad():
        for weight in other.components["unet"].conv_out.parameters():
            weight.mul_(0.5)
    other.save_pretrained(models / "other")  # its card says scenes-tiny, and clients know it by its folder
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, adapters / "ink.safetensors")
    (models / "notes.txt").write_text("no model")
    (models / "empty").mkdir()
    return models, adapters


@pytest.fixture(scope="module")
def shop(tiny, tiny_model, places, tmp_path_factory):
    """A server with both folders."""
    shelf = Shelf(tiny, lambda path, _: opened(tiny_model if path is None else path), *places)
    with Served(tiny, tmp_path_factory.mktemp("shop") / "outputs", shelf=shelf) as server:
        yield server


def test_models_by_name(shop, places, tiny):
    """Each draws what its own pipeline draws, to the bit; a client's choice is its own."""
    client = shop.client()
    assert [model.id for model in client.models.list()] == ["scenes-tiny", "other"]
    pipes = {"scenes-tiny": tiny, "other": opened(places[0] / "other")}
    for name in ("other", "scenes-tiny", "other"):
        (item,) = client.images.generate(prompt=PROMPT, model=name, extra_body=QUICK).data
        np.testing.assert_array_equal(decoded(item), np.asarray(pipes[name](PROMPT, **QUICK).images[0]))
    (item,) = client.images.generate(prompt=PROMPT, extra_body=QUICK).data
    np.testing.assert_array_equal(decoded(item), np.asarray(tiny(PROMPT, **QUICK).images[0]))
    for name in ("../models/other", "empty", "notes", str(places[0] / "other")):
        with pytest.raises(openai.NotFoundError, match="one of scenes-tiny, other"):
            client.images.generate(prompt=PROMPT, model=name)


def test_a1111_chooses_the_model_of_all(shop, places):
    """By name or title; a title gets its hash when the model is loaded."""
    sha256 = opened(places[0] / "other").card.hash
    assert shop.post("/sdapi/v1/options", {"sd_model_checkpoint": "other"}).status_code == 200
    try:
        options = get(f"{shop.address}/sdapi/v1/options").json()
        assert options["sd_model_checkpoint"] == f"other [{sha256[:10]}]"
        body = {"prompt": PROMPT, "steps": 2, "seed": 1}
        assert json.loads(shop.post("/sdapi/v1/txt2img", body).json()["info"])["sd_model_name"] == "other"
        chosen = {**body, "override_settings": {"sd_model_checkpoint": "scenes-tiny"}}
        assert json.loads(shop.post("/sdapi/v1/txt2img", chosen).json()["info"])["sd_model_name"] == "scenes-tiny"
    finally:
        shop.post("/sdapi/v1/options", {"sd_model_checkpoint": "scenes-tiny"})
    assert get(f"{shop.address}/health").json()["model"] == "scenes-tiny"


@pytest.mark.parametrize("weight", [0.8, -0.5])
def test_adapters_in_the_prompt(shop, places, tiny_model, tiny, weight):
    """<lora:NAME:WEIGHT> draws what the adapter at this weight draws, to the bit, and the others' pictures stay."""
    assert [row["name"] for row in get(f"{shop.address}/sdapi/v1/loras").json()] == ["ink"]
    (item,) = shop.client().images.generate(prompt=f"{PROMPT} <lora:ink:{weight}>", extra_body=QUICK).data
    pipe = opened(tiny_model)
    pipe.load_lora_weights(places[1] / "ink.safetensors", weight=weight, fuse=True)
    expected = np.asarray(pipe(PROMPT, **QUICK).images[0])
    np.testing.assert_array_equal(decoded(item), expected)
    plain = np.asarray(tiny(PROMPT, **QUICK).images[0])
    assert (plain != expected).any()
    (item,) = shop.client().images.generate(prompt=PROMPT, extra_body=QUICK).data
    np.testing.assert_array_equal(decoded(item), plain)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:pen>", "unknown adapter 'pen'; one of ink"),
        ("a <lora:../ink>", "unknown adapter '../ink'"),
        ("a <lora:ink:much>", "<lora:NAME:WEIGHT>"),
        ("a <lora:ink:nan>", "<lora:NAME:WEIGHT>"),
        ("a <lora:ink:1:2>", "<lora:NAME:WEIGHT>"),
        ("a <lora:ink:1> <lora:ink:0.5>", "named twice"),
        ("<lora:a:1>" * LONGEST_PROMPT, "prompt"),
    ],
)
def test_adapters_that_are_refused(shop, prompt, message):
    answer = shop.post("/v1/images/generations", {"prompt": prompt, **QUICK})
    assert (answer.status_code, message in answer.text) == (422, True), answer.text[:300]


def test_a_replaced_or_removed_adapter_is_not_drawn_with(shop, places, tiny_model):
    """A file is known by its state, not by its name alone; bytes that are no name are no adapter's."""
    path, body = places[1] / "pen.safetensors", {"prompt": f"{PROMPT} <lora:pen>", **QUICK}
    shutil.copy(places[1] / "ink.safetensors", path)
    (places[1] / os.fsdecode(b"b\xff.safetensors")).write_bytes(b"")
    first = shop.post("/v1/images/generations", body).json()["data"][0]["b64_json"]
    save_file(
        {name: -tensor for name, tensor in load_file(path).items() if "lora_A" in name}
        | {name: tensor for name, tensor in load_file(path).items() if "lora_B" in name},
        path,
    )
    second = shop.post("/v1/images/generations", body).json()["data"][0]["b64_json"]
    assert Image.open(io.BytesIO(base64.b64decode(first))).tobytes() != (
        Image.open(io.BytesIO(base64.b64decode(second))).tobytes()
    )
    path.unlink()
    answer = shop.post("/v1/images/generations", body)
    assert (answer.status_code, "unknown adapter 'pen'; one of ink" in answer.text) == (422, True)


def test_a_model_that_does_not_load_costs_no_other_its_place(tiny, places):
    """It fails again at once while its file is the same."""
    opens = []

    def open_(path, torch):
        opens.append(path)
        raise ModelError("broken")

    shelf = Shelf(tiny, open_, *places, keep=2)
    for _ in range(3):
        with pytest.raises(ModelError, match="broken"):
            shelf.take(Wanted("other"))
    assert opens == [places[0] / "other"]
    assert shelf.loaded(Wanted("scenes-tiny")) is tiny


def test_a_model_is_loaded_again_when_a_file_of_it_changes(tiny, places, tmp_path):
    """Weights that are replaced, and a file that was missing; memory that ran out is tried again in any case."""
    shutil.copytree(places[0] / "other", tmp_path / "other")
    opens, fails = [], [ModelError("no weights"), ResourceError("out of memory")]

    def open_(path, torch):
        opens.append(path)
        if fails:
            raise fails.pop(0)
        return LatentDiffusionPipeline(tiny.model)

    shelf = Shelf(tiny, open_, tmp_path)
    for error in (ModelError, ModelError):
        with pytest.raises(error):
            shelf.take(Wanted("other"))
    (tmp_path / "other" / "unet" / "more.safetensors").touch()
    with pytest.raises(ResourceError):
        shelf.take(Wanted("other"))
    first = shelf.take(Wanted("other"))
    assert shelf.take(Wanted("other")) is first
    weights = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert shelf.loaded(Wanted("other")) is None
    assert shelf.take(Wanted("other")) is not first
    assert len(opens) == 4


def test_two_models_of_one_name_are_refused(tiny, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "scenes-tiny")
    with pytest.raises(ConfigError, match="two models are called scenes-tiny"):
        Shelf(tiny, lambda *_: tiny, tmp_path)
    Shelf(opened(tmp_path / "scenes-tiny"), lambda *_: tiny, tmp_path)  # itself


@pytest.mark.slow
def test_waiting_pictures_hold_no_more_models_than_are_kept(shop):
    """Requests with many weights wait for a model's place, and each is answered."""
    painters, statuses = [], []
    body = {"num_inference_steps": 30, "seed": 1}

    def ask(weight):
        prompt = {"prompt": f"a ring <lora:ink:{weight}>"}
        statuses.append(shop.post("/v1/images/generations", body | prompt).status_code)

    threads = [threading.Thread(target=ask, args=(round(0.01 * k, 2),)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        painters.append(len(shop.studio.worker.painters()))
        time.sleep(0.005)
    assert statuses == [200] * 8
    assert max(painters) <= shop.studio.shelf.keep


def test_one_place_for_both_forms_of_a_model(tiny, tmp_path, monkeypatch):
    """A request that requires torch does not hold the compiled model while it waits for the place."""
    compiled, by_torch = tiny.model, replace(tiny.model)
    shelf = Shelf(tiny, lambda _, torch: LatentDiffusionPipeline(by_torch if torch else compiled), keep=1)
    lacks = lambda request, model: "vae_tiling" if request.vae_tiling and model is compiled else None  # noqa: E731
    monkeypatch.setattr(studio, "torch_only", lacks)
    body = {"prompt": PROMPT, "vae_tiling": True, **QUICK}
    with Served(tiny, tmp_path / "out", shelf=shelf) as server:
        for _ in range(2):
            assert server.post("/v1/images/generations", body).status_code == 200
        assert server.studio._held == []


def test_the_server_stops_while_a_model_loads(tiny, places, tmp_path):
    """Its client is answered by 503, and nobody waits for the model."""
    loading = threading.Event()

    def slow(path, torch):
        loading.set()
        time.sleep(2)
        return LatentDiffusionPipeline(tiny.model)

    answers = []
    with Served(tiny, tmp_path / "out", shelf=Shelf(tiny, slow, *places)) as server:
        body = {"prompt": "a", "model": "other", **QUICK}
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/images/generations", body)))
        asking.start()
        loading.wait(20)
        assert get(f"{server.address}/page/style.css").status_code == 200  # nothing else waits
        server.studio.worker.stop()
        asking.join(1.5)
        assert (answers[0].status_code, answers[0].json()["error"]["message"]) == (503, "the server stops")


def test_a_picture_of_another_model_of_this_name(shop, tiny):
    body = {"settings": {"prompt": "a", **QUICK}, "model": "scenes-tiny"}
    assert shop.post("/api/draw", body | {"hash": tiny.card.hash}).status_code == 200
    answer = shop.post("/api/draw", body | {"hash": "0" * 64})
    assert (answer.status_code, "another model that is called scenes-tiny" in answer.text) == (422, True)


def test_a_prompt_without_its_adapters():
    assert without_tags("a cat") == ("a cat", ())
    assert without_tags("a cat <lora:ink:0.5>, red <lora:b>") == ("a cat, red", (Adapter("ink", 0.5), Adapter("b")))
    assert without_tags("<lora:ink>a  cat ") == ("a  cat ", (Adapter("ink", 1.0),))


def test_the_model_that_was_used_least_lately_leaves(tiny, places):
    opens = []

    def open_(path, torch):
        opens.append((path, torch))
        return LatentDiffusionPipeline(tiny.model)

    shelf = Shelf(tiny, open_, *places, keep=2)
    first, other, torch_only = Wanted("scenes-tiny"), Wanted("other"), Wanted("scenes-tiny", torch=True)
    shelf.take(other)
    shelf.take(first)
    shelf.take(torch_only)  # in place of `other`
    assert (shelf.loaded(other), shelf.loaded(first)) == (None, tiny)
    assert shelf.loaded(torch_only).card.name == "scenes-tiny"
    assert opens == [(places[0] / "other", False), (None, True)]
    with pytest.raises(ConfigError, match="unknown model 'etc'"):
        shelf.take(Wanted("etc"))
    assert shelf.loaded(first) is tiny  # an unknown name costs nobody a model


def test_a_model_in_use_keeps_its_place(tiny, places):
    """Though it was used least lately: dropping it would free no memory."""
    shelf = Shelf(tiny, lambda *_: LatentDiffusionPipeline(tiny.model), *places, keep=2)
    first, other = Wanted("scenes-tiny"), Wanted("other")
    shelf.take(other)
    shelf.take(Wanted("scenes-tiny", torch=True), {id(tiny.painter)})
    assert (shelf.loaded(first), shelf.loaded(other)) == (tiny, None)


# the history


@pytest.fixture
def image(tiny, tmp_path):
    """A folder with four pictures, drawn on four days, one of them a JPEG."""
    prompts = ["a red circle", "a blue square", "two red rings", '<b>Ünïcode</b> "ring" OR *']
    days = [datetime(2026, 1, day, 12).timestamp() for day in (1, 2, 3, 4)]
    for number, (prompt, day) in enumerate(zip(prompts, days, strict=True)):
        out = tiny(prompt, num_inference_steps=1, seed=number, negative_prompt="blurry" if number == 1 else "")
        suffix = ".jpg" if number == 2 else ".png"
        ((path, _),) = write_pictures(out.images, out.metadata, tmp_path, suffix, metadata=True)
        os.utime(path, (day, day))
    Image.new("RGB", (8, 8)).save(tmp_path / "00005-1.png")  # without a record
    (tmp_path / "00006-1.png").write_bytes(b"broken")
    (tmp_path / "00007-1.png").symlink_to(tmp_path / "00001-0.png")
    (tmp_path / "holiday.png").write_bytes(b"someone else's")
    return tmp_path


def names(folder, **search):
    return [entry.name for entry in History(folder).search(Search(**search))]


def test_words_models_and_dates(image):
    everything = ["00004-3.png", "00003-2.jpg", "00002-1.png", "00001-0.png"]
    assert names(image) == everything
    assert names(image, words="red") == ["00003-2.jpg", "00001-0.png"]
    assert names(image, words="RI") == ["00004-3.png", "00003-2.jpg"]
    assert names(image, words="red ring") == ["00003-2.jpg"]
    assert names(image, words="blurry") == ["00002-1.png"]
    assert names(image, words="unicode") == ["00004-3.png"]
    assert names(image, words='"OR* ring" -') == ["00004-3.png"]
    assert names(image, words="'; DROP TABLE pictures; --") == []
    assert names(image, model="scenes-tiny") == everything
    assert names(image, model="other") == []
    day = [int(datetime(2026, 1, day).timestamp() * 1e6) for day in (2, 4)]
    assert names(image, since=day[0], until=day[1]) == ["00003-2.jpg", "00002-1.png"]
    history = History(image)
    history.search(Search(count=1))
    assert history.models() == ["scenes-tiny"]


def test_a_page_after_another(image):
    entries = History(image).search(Search(count=3))
    rest = History(image).search(Search(before=entries[-1].place))
    assert [entry.name for entry in entries + rest] == names(image)


@pytest.mark.parametrize("damage", ["gone", "garbage", "another version", "a page"])
def test_the_files_are_the_truth(image, damage):
    """Whatever happens to the index, the next search finds what is there: also new, changed and removed pictures."""
    before, index = names(image), image / FILE
    shutil.copy2(image / "00001-0.png", image / "00008-0.png")
    (image / "00003-2.jpg").unlink()
    if damage == "gone":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"garbage" * 1000)
    elif damage == "another version":
        with sqlite3.connect(index) as connection:
            connection.execute("PRAGMA user_version = 1")
    else:
        content = bytearray(index.read_bytes())
        content[4096:8192] = bytes(4096)
        index.write_bytes(content)
    assert names(image) == ["00004-3.png", "00002-1.png", "00008-0.png", "00001-0.png"]
    assert set(before) - set(names(image)) == {"00003-2.jpg"}


def test_the_index_is_damaged_while_the_server_runs(image):
    """Also if it is a folder, or cannot be written."""
    history, everything = History(image), Search()
    expected = [entry.name for entry in history.search(everything)]
    content = bytearray((image / FILE).read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    (image / FILE).write_bytes(content)
    assert [entry.name for entry in history.search(everything)] == expected
    (image / FILE).unlink()
    (image / FILE).mkdir()
    assert [entry.name for entry in history.search(everything)] == expected


def test_pictures_of_any_time(image):
    for year, name in ((2300, "00001-0.png"), (1960, "00002-1.png")):
        seconds = (year - 1970) * 365.25 * 86400
        os.utime(image / name, (seconds, seconds))
    assert names(image) == ["00001-0.png", "00004-3.png", "00003-2.jpg", "00002-1.png"]


def test_the_history_by_http(tiny, image):
    with Served(tiny, image) as server:
        answer = get(f"{server.address}/api/history", params={"words": "ring", "until": "2026-01-03"}).json()
        assert [each["name"] for each in answer["pictures"]] == ["00003-2.jpg"]
        record = answer["pictures"][0]["record"]
        assert (record["settings"]["prompt"], record["settings"]["seed"]) == ("two red rings", "2")
        picture = get(f"{server.address}/pictures/00003-2.jpg")
        assert (picture.headers["content-type"], picture.content) == (
            "image/jpeg",
            (image / "00003-2.jpg").read_bytes(),
        )
        for name in ("00007-1.png", "holiday.png", FILE, quote("../x", safe="")):
            assert get(f"{server.address}/pictures/{name}").status_code == 404
        for day, count in (("0002-01-01", 4), ("2300-01-01", 0), ("9999-12-31", 0)):
            result = get(f"{server.address}/api/history", params={"since": day}).json()["pictures"]
            assert len(result) == count
        assert len(get(f"{server.address}/api/history", params={"until": "9999-12-31"}).json()["pictures"]) == 4
        first = get(f"{server.address}/api/history", params={"count": 3}).json()["pictures"]
        rest = get(f"{server.address}/api/history", params={"before": first[-1]["place"]}).json()["pictures"]
        assert [each["name"] for each in rest] == ["00001-0.png"]
        for signs, count in (("!!!", 0), ("*", 1), ("🔴", 0)):  # signs alone are looked for as they are
            result = get(f"{server.address}/api/history", params={"words": signs}).json()["pictures"]
            assert len(result) == count
        assert httpx.head(f"{server.address}/pictures/00003-2.jpg").status_code == 200
        far = f"{10**18}-1"
        assert get(f"{server.address}/api/history", params={"before": "9" * 18 + "-1"}).status_code == 200
        for bad in ({"since": "yesterday"}, {"before": "x"}, {"before": far}, {"count": 10**6}, {"words": "x" * 300}):
            assert get(f"{server.address}/api/history", params=bad).status_code == 422
