"""`latentdiff serve`: OpenAI's images API by its own client, the queue, and what is refused."""

import asyncio
import base64
import io
import json
import re
import shlex
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from latentdiff.core.errors import TOO_LARGE
from latentdiff.drawing.draw import Drawing, canvas_of, jobs_of
from latentdiff.drawing.record import read_metadata
from latentdiff.server import run
from latentdiff.server.guard import LOOPBACK, Limits, names_of
from latentdiff.server.shelf import Shelf, Wanted
from latentdiff.server.studio import Studio
from latentdiff.server.work import FullError, Ticket, Worker

from .conftest import ROOT
from .forked import Started
from .serving import PROMPT, Served, get, png, post, stream

FOREIGN = "http://169.254.169.254/latest/meta-data"
QUICK = {"num_inference_steps": 4, "seed": 7}


@pytest.fixture
def connections(monkeypatch):
    """The hosts that this process, the server in it, connects to."""
    hosts, connect = set(), socket.socket.connect

    def noted(self, address):
        hosts.add(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return hosts


def make_jobs(pipe):
    """One picture to be drawn."""
    request = pipe.request("a", **QUICK)
    return jobs_of(pipe.model, request, canvas_of(pipe.model, request, None, None))


def decoded(item):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item.b64_json))))


# OpenAI's client


def test_pictures_are_those_of_the_pipeline(served, tiny):
    """To the bit, with the record; extra settings are drawing's."""
    answer = served.client().images.generate(prompt=PROMPT, n=2, extra_body=QUICK)
    expected = tiny(PROMPT, num_images_per_prompt=2, **QUICK).images
    for item, own in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(decoded(item), np.asarray(own))
    record = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json))).text
    assert json.loads(record["latentdiff"])["seed"] == 8
    assert "Seed: 8" in record["parameters"]
    files = {file.read_bytes() for file in served.studio.folder.glob("*.png")}
    assert {base64.b64decode(item.b64_json) for item in answer.data} <= files, "the answer is the file"


def test_urls_lead_to_the_files(served):
    answer = served.client().images.generate(prompt=PROMPT, response_format="url", extra_body=QUICK)
    picture = get(answer.data[0].url)
    assert (picture.status_code, picture.headers["x-content-type-options"]) == (200, "nosniff")
    file = served.studio.folder / answer.data[0].url.rpartition("/")[2]
    assert picture.content == file.read_bytes()
    assert read_metadata(file)["latentdiff"]["request"]["prompt"] == PROMPT


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(served, kind, name):
    client = served.client()
    sizes = []
    for compression in (20, 90):
        answer = client.images.generate(
            prompt=PROMPT, output_format=kind, output_compression=compression, size="64x48", extra_body=QUICK
        )
        data = base64.b64decode(answer.data[0].b64_json)
        sizes.append(len(data))
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (name, (64, 48))
    assert sizes[0] < sizes[1]


def test_a_stream_previews_and_ends_with_the_picture(served, tiny):
    events = list(served.client().images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=QUICK))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    (expected,) = tiny(PROMPT, **QUICK).images
    np.testing.assert_array_equal(decoded(events[-1]), np.asarray(expected))
    steps = [tiny.decode(step.x0) for step in tiny.stream(PROMPT, **QUICK)]
    from latentdiff.core.images import to_uint8

    for number, event in enumerate(events[:-1]):
        np.testing.assert_array_equal(decoded(event), to_uint8(steps[number])[0])


def test_transparent_parts_of_a_mask_are_redrawn(served, tiny, photo):
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, :32] = 0
    mask = photo.convert("RGBA")
    mask.putalpha(Image.fromarray(alpha))
    answer = served.client().images.edit(
        image=("a.png", png(photo)), mask=("m.png", png(mask)), prompt="two pink rings", extra_body=QUICK
    )
    (expected,) = tiny("two pink rings", image=photo, mask_image=255 - alpha, **QUICK).images
    np.testing.assert_array_equal(decoded(answer.data[0]), np.asarray(expected))
    np.testing.assert_array_equal(decoded(answer.data[0])[:, 32:], np.asarray(photo)[:, 32:])


def test_without_a_mask_the_whole_picture_is_redrawn(served, tiny, photo):
    body = {**QUICK, "strength": 0.5}
    answer = served.client().images.edit(image=("a.png", png(photo)), prompt="two pink rings", extra_body=body)
    (expected,) = tiny("two pink rings", image=photo, **body).images
    np.testing.assert_array_equal(decoded(answer.data[0]), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # OpenAI's own models
def test_variations(served, tiny, photo):
    answer = served.client().images.create_variation(image=("a.png", png(photo)), n=2, extra_body=QUICK)
    expected = tiny("", image=photo, strength=0.6, num_images_per_prompt=2, **QUICK).images
    for item, own in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(decoded(item), np.asarray(own))


def test_models_and_aliases(served):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["scenes-tiny"]
    for name in ("scenes-tiny", "gpt-image-1", "default"):
        assert client.images.generate(prompt="a ring", model=name, extra_body=QUICK).data
    with pytest.raises(openai.NotFoundError, match="one of scenes-tiny"):
        client.images.generate(prompt="a ring", model="../../etc", extra_body=QUICK)


def test_what_is_ignored_is_named(served):
    body = {"prompt": "a ring", "quality": "hd", "user": "me", "partial_images": 1, "output_compression": 5, **QUICK}
    answer = served.post("/v1/images/generations", body)
    names = "output_compression, partial_images, quality, user"
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, names)
    body = {"prompt": "a ring", "response_format": "url", "output_format": "jpeg", "a\r\nset-cookie: b": 1, **QUICK}
    answer = served.post("/v1/images/generations", body)
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, "a??set-cookie: b, output_format")
    assert answer.json()["data"][0]["url"].endswith(".png")


def test_an_answer_says_what_its_pictures_are(served):
    answer = served.client().images.generate(prompt="a ring", output_format="webp", size="64x48", extra_body=QUICK)
    facts = (answer.size, answer.output_format, answer.background, answer.usage.total_tokens)
    assert facts == ("64x48", "webp", "opaque", 0)


# the queue


def test_requests_at_once_share_batches_and_none_is_lost(served, tiny):
    """As many as wait are drawn together; each client gets the picture of its own prompt and seed."""
    before = served.studio.worker.count
    answers = {}

    def ask(seed):
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": 4}
        answers[seed] = served.post("/v1/images/generations", body).json()["data"][0]["b64_json"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.studio.worker.count - before == 12
    sizes = set()
    for seed, data in answers.items():
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        facts = json.loads(image.text["latentdiff"])
        sizes.add(facts["batch"][1])
        (expected,) = tiny(PROMPT, seed=seed, num_inference_steps=4).images
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
        assert facts["seed"] == seed
    assert max(sizes) > 1


def test_a_full_queue_refuses(tiny, tmp_path):
    """Later there may be room; for more pictures than the queue can hold there never is."""
    with Served(tiny, tmp_path / "out", most_waiting=2) as server:
        answer = server.post("/v1/images/generations", {"prompt": "a", "n": 3, **QUICK})
        assert (answer.status_code, "at most 2 pictures" in answer.text) == (422, True)
        bodies = [{"prompt": "a", "num_inference_steps": steps} for steps in (1000, 999)]  # in batches of their own
        threads = [threading.Thread(target=server.post, args=("/v1/images/generations", body)) for body in bodies]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.studio.worker.current() and server.studio.worker.waiting)
        answer = server.post("/v1/images/generations", {"prompt": "a", "n": 2, **QUICK})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert not (tmp_path / "out").exists()
        server.studio.worker.stop()
        for thread in threads:
            thread.join()


def test_cancelled_pictures_leave_room(tiny, tmp_path):
    """Before the worker has come to them."""
    job = make_jobs(tiny)[0]

    async def submit(worker):
        tickets = [worker.submit(Ticket(tiny.painter, [job] * 4, "me")) for _ in range(2)]
        with pytest.raises(FullError, match="8 of your pictures wait"):
            worker.submit(Ticket(tiny.painter, [job], "me"))
        tickets[0].cancelled = True
        worker.submit(Ticket(tiny.painter, [job] * 4, "me"))
        with pytest.raises(FullError, match="8 pictures wait"):
            worker.submit(Ticket(tiny.painter, [job] * 3, "you"))

    asyncio.run(submit(Worker(None, most=10, most_of_one=8)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), TOO_LARGE),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), TOO_LARGE),
        (KeyError("/home/me"), "the server failed (KeyError); its log says where"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/api/draw", "/v1/models"])
def test_failures_are_answered_in_the_same_form(served, monkeypatch, error, message, path):
    """In the worker, in a stream and in a route; the next request is served."""

    def failed(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Drawing, "finish", failed)
        patch.setattr(Shelf, "names", failed) if path == "/v1/models" else None
        if path == "/api/draw":
            answer = served.post(path, {"settings": {"prompt": "a", **QUICK}})
            assert json.loads(answer.text.splitlines()[-1]) == {"kind": "error", "message": message}
        else:
            answer = get(served.address + path) if path == "/v1/models" else served.post(path, {"prompt": "a", **QUICK})
            assert (answer.status_code, answer.json()["error"]["message"]) == (500, message)
            assert answer.json().get("detail") == (message if path.startswith("/sdapi") else None)
    assert served.post("/v1/images/generations", {"prompt": "a", **QUICK}).status_code == 200


def test_previews_are_decoded_as_the_picture(served, monkeypatch):
    """In tiles, if the request asks for them."""
    codec, tiled = served.studio.shelf.take(Wanted("scenes-tiny")).model.codec, []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda latents: tiled.append(codec.vae.use_tiling) or decode(latents))
    body = {"prompt": "a", "stream": True, "partial_images": 2, "vae_tiling": True, **QUICK}
    assert served.post("/v1/images/generations", body).status_code == 200
    assert tiled == [True] * 3


def test_what_is_before_a_ticket_counts_what_is_being_drawn(tiny, tmp_path):
    with Served(tiny, tmp_path / "out") as server:
        body = {"prompt": "a", "num_inference_steps": 1000, "stream": True}
        with stream("POST", f"{server.address}/v1/images/generations", json=body, timeout=60):
            wait_for(lambda: server.studio.worker.current())
            (first,) = server.studio.worker.current()
            later = threading.Thread(target=server.post, args=("/v1/images/generations", {"prompt": "b", **QUICK}))
            later.start()
            wait_for(lambda: server.studio.worker.waiting)
            ((ticket, _),) = server.studio.worker._waiting
            assert (server.studio.worker.ahead_of(first), server.studio.worker.ahead_of(ticket)) == (0, 1)
        later.join()


def test_a_hundred_requests_at_once(tiny, tmp_path, connections):
    """Each is answered, with a picture or 429; then the queue is empty, and the next client is served."""
    statuses = []
    with Served(tiny, tmp_path / "out", most_waiting=10) as server:
        body = {"prompt": PROMPT, "num_inference_steps": 20, "seed": 1}
        asking = [lambda: statuses.append(server.post("/v1/images/generations", body).status_code)] * 100
        threads = [threading.Thread(target=ask) for ask in asking]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == 100
        assert set(statuses) == {200, 429}
        assert len(list((tmp_path / "out").glob("*.png"))) == statuses.count(200) == server.studio.worker.count
        wait_for(lambda: (server.studio.worker.waiting, server.studio.worker.current()) == (0, []))
        assert server.post("/v1/images/generations", {"prompt": "a ring", **QUICK}).status_code == 200
    assert connections <= {"127.0.0.1"}


def test_a_client_that_goes_away_cancels(served):
    """Its pictures are left between steps, and the next client is served."""
    body = {"prompt": PROMPT, "num_inference_steps": 1000, "stream": True, "partial_images": 1}
    before = served.studio.worker.count
    with stream("POST", f"{served.address}/v1/images/generations", json=body, timeout=60) as answer:
        assert answer.status_code == 200
    assert served.post("/v1/images/generations", {"prompt": "a ring", **QUICK}).status_code == 200
    assert served.studio.worker.count == before + 1


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_client_without_a_stream_that_goes_away_cancels(served, path):
    before = served.studio.worker.count
    body = {"prompt": PROMPT, "num_inference_steps": 1000, "steps": 1000, "n": 10, "n_iter": 10}
    with pytest.raises(httpx.ReadTimeout):
        post(served.address + path, json=body, timeout=0.5)
    wait_for(lambda: not served.studio.worker.current() and not served.studio.worker.waiting, 20)
    assert served.studio.worker.count == before


def test_what_is_open_when_the_server_stops_is_answered(tiny, tmp_path):
    with Served(tiny, tmp_path / "out") as server:
        answers = []
        body = {"prompt": PROMPT, "num_inference_steps": 1000}
        asking = threading.Thread(target=lambda: answers.append(server.post("/v1/images/generations", body)))
        asking.start()
        while not server.studio.worker.current():
            time.sleep(0.01)
        server.studio.worker.stop()
        asking.join()
        assert (answers[0].status_code, answers[0].json()["error"]["message"]) == (503, "the server stops")
        assert server.post("/v1/images/generations", {"prompt": "a"}).status_code == 503
    assert not list(tmp_path.rglob("*.png"))


def test_pictures_that_cannot_be_written(tiny, tmp_path):
    """One sentence for each API, and drawing goes on when the folder is there again."""
    (tmp_path / "out").write_text("a file")
    with Served(tiny, tmp_path / "out") as server:
        answer = server.post("/v1/images/generations", {"prompt": "a", **QUICK})
        assert (answer.status_code, "cannot be written" in answer.json()["error"]["message"]) == (500, True)
        lines = server.post("/api/draw", {"settings": {"prompt": "a", **QUICK}}).text.splitlines()
        assert "cannot be written" in json.loads(lines[-1])["message"]
        (tmp_path / "out").unlink()
        assert server.post("/v1/images/generations", {"prompt": "a", **QUICK}).status_code == 200


def test_a_mask_is_upright_and_has_transparent_parts(served, photo):
    """EXIF turns the mask as it turns the picture; a mask that is opaque everywhere redraws nothing."""
    url, data = f"{served.address}/v1/images/edits", {"prompt": "a ring", "response_format": "b64_json", **QUICK}
    opaque = {"image": png(photo), "mask": png(Image.new("RGB", photo.size, "white"))}
    answer = post(url, files=opaque, data=data, timeout=60)
    assert (answer.status_code, "no transparent part" in answer.text) == (422, True)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:16] = 0  # upside down by its EXIF: the bottom is redrawn
    mask, exif, content = Image.fromarray(np.dstack([*[alpha] * 3, alpha])), Image.Exif(), io.BytesIO()
    exif[274] = 3
    mask.save(content, "PNG", exif=exif)
    answer = post(url, files={"image": png(photo), "mask": content.getvalue()}, data=data, timeout=60)
    sample = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
    np.testing.assert_array_equal(sample[:48], np.asarray(photo)[:48])
    assert (sample[48:] != np.asarray(photo)[48:]).any()


def test_a_long_prompt_as_jpeg(served):
    """A JPEG has no room for its record: the file in the folder has it."""
    body = {"prompt": "\u5706" * 9000, "output_format": "jpeg", **QUICK}
    answer = served.post("/v1/images/generations", body).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).format == "JPEG"


# what is refused


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_foreign_requests(served, headers, status):
    body = json.dumps({"prompt": "a", **QUICK})
    answer = post(
        f"{served.address}/v1/images/generations",
        content=body,
        headers={"content-type": "application/json", **headers},
    )
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_reading_for_another_site_is_refused_too(served):
    """An <img> of another page could load models; a link that leads to the page is followed."""
    foreign = {"sec-fetch-site": "cross-site"}
    for path in ("/v1/models", "/api/models/scenes-tiny", "/pictures/00001-7.png"):
        assert get(served.address + path, headers=foreign).status_code == 403
    assert get(served.address, headers=foreign | {"sec-fetch-mode": "navigate"}).status_code == 200


def test_local_addresses_check_the_host():
    assert names_of("127.0.0.2") == (*LOOPBACK, "127.0.0.2")
    assert names_of("::1") == (*LOOPBACK, "[::1]")
    assert names_of("0.0.0.0") is None


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 422, "prompt is empty"),
        ({"prompt": 5}, 422, "prompt: must be text"),
        ({"prompt": "a", "n": 0}, 422, "n: must be at least 1"),
        ({"prompt": "a", "n": 11}, 422, "n: must be at most 10"),
        ({"prompt": "a", "size": "10x"}, 422, "size: "),
        ({"prompt": "a", "size": "99999x99999"}, 422, "height must be a multiple"),
        ({"prompt": "a", "num_inference_steps": 10**9}, 422, "num_inference_steps: "),
        ({"prompt": "a", "sampler": "magic"}, 422, "unknown sampler 'magic'"),
        ({"prompt": "x" * 10_001}, 422, "prompt: "),
        ({"prompt": "a", "background": "transparent"}, 422, "background: "),
        ({"prompt": "a", "seed": "x"}, 422, "seed: "),
        ({"prompt": "a", "num_images": 2}, 422, "n, not num_images"),
        ([1], 422, ""),
        ("text", 422, ""),
    ],
)
def test_bad_bodies(served, body, status, message):
    answer = served.post("/v1/images/generations", body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_bad_pictures(served, connections):
    url = f"{served.address}/v1/images/edits"
    for content, message in ((b"<html>", "not an image"), (b"", "empty"), (png(Image.new("L", (2, 1))), "pixels")):
        answer = post(url, files={"image": ("a.png", content)}, data={"prompt": "a"}, timeout=30)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (422, True), answer.text
    answer = post(url, data={"prompt": "a", "image": FOREIGN}, files={"x": b""}, timeout=30)
    assert (answer.status_code, "image must be one picture" in answer.text) == (422, True)
    for body in ({"images": [{"image_url": FOREIGN}]}, {"image_url": FOREIGN}):
        assert served.post("/v1/images/edits", {"prompt": "a", **body}).status_code == 422
    for path, body in (
        ("/api/draw", {"settings": {"prompt": "a"}, "image": FOREIGN}),
        ("/api/read", {"image": FOREIGN}),
        ("/sdapi/v1/img2img", {"prompt": "a", "init_images": [FOREIGN]}),
        ("/sdapi/v1/extra-single-image", {"image": FOREIGN}),
    ):
        answer = served.post(path, body)
        assert (answer.status_code, "addresses are never fetched" in answer.text) == (422, True)
    assert connections <= {"127.0.0.1"}


def test_only_pictures_that_were_drawn_are_served(served, tmp_path):
    secret = served.studio.folder / "secret.txt"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("x")
    (served.studio.folder / "00099-1.png").symlink_to(secret)
    for name in ("secret.txt", "../secret.txt", "..%2fsecret.txt", "00099-1.png", "00001-1.svg", "%00.png"):
        assert get(f"{served.address}/pictures/{name}").status_code == 404


def test_a_token(tiny, tmp_path):
    with Served(tiny, tmp_path / "out", hosts=None, token="long enough") as server:
        good = base64.b64encode(b"anybody:long enough").decode()
        for value, status in (
            (None, 401),
            ("Bearer wrong", 401),
            ("Basic !!!", 401),
            ("Basic é".encode("latin-1"), 401),
            ("Bearer long enough", 200),
            (f"Basic {good}", 200),
        ):
            answer = get(f"{server.address}/v1/models", headers={} if value is None else {"authorization": value})
            assert answer.status_code == status
        assert get(f"{server.address}/health").status_code == 200
        assert get(f"{server.address}/metrics").status_code == 401


def test_large_and_slow_bodies(tiny, tmp_path):
    with Served(tiny, tmp_path / "out", limits=Limits(body=1000, seconds=0.3)) as server:
        assert server.post("/v1/images/generations", {"prompt": "x" * 2000}).status_code == 413
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert 'latentdiff_refused_total{status="413"} 1.0' in get(f"{server.address}/metrics").text


def test_bodies_of_all_requests_are_bounded(tiny, tmp_path):
    """While one request is drawn, another one's body finds no room."""
    with Served(tiny, tmp_path / "out", limits=Limits(body=1000, bodies=1000)) as server:
        body = {"prompt": "x" * 600, "num_inference_steps": 1000, "stream": True}
        with stream("POST", f"{server.address}/v1/images/generations", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            assert server.post("/v1/images/generations", {"prompt": "x" * 600}).status_code == 503
            assert server.post("/v1/images/generations", {"prompt": ""}).status_code == 422
        wait_for(lambda: not server.studio.worker.current())
        assert server.post("/v1/images/generations", {"prompt": "x" * 600, **QUICK}).status_code == 200


def test_connections_without_a_whole_request_are_closed(tiny, tmp_path, monkeypatch):
    """Also after a first request; what is being answered is not closed."""
    monkeypatch.setattr(run, "IDLE", 0.5)
    studio = Studio(Shelf(tiny, lambda *_: tiny), tmp_path / "out")
    listener = run.listening("127.0.0.1", 0)
    address = listener.getsockname()
    thread = threading.Thread(target=run.serve, args=(studio, listener, LOOPBACK, None), daemon=True)
    thread.start()
    head = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
    body = json.dumps({"prompt": "a", "num_inference_steps": 60})
    ask = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\nContent-Type: application/json\r\n"
    with (
        socket.create_connection(address) as empty,
        socket.create_connection(address) as half,
        socket.create_connection(address) as drawn,
    ):
        drawn.sendall(f"{ask}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        half.sendall(f"{head}\r\n".encode())
        assert half.recv(1000).startswith(b"HTTP/1.1 200")
        half.sendall(head.encode())
        for each in (empty, half):
            each.settimeout(30)
            while each.recv(1000):
                pass
        drawn.settimeout(60)
        assert drawn.recv(100).startswith(b"HTTP/1.1 200")


def test_a_wrong_method_names_the_right_one(served):
    answer = get(f"{served.address}/v1/images/generations")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_health_and_metrics(served):
    health = get(f"{served.address}/health").json()
    assert (health["status"], health["model"]) == ("ok", "scenes-tiny")
    text = get(f"{served.address}/metrics").text
    assert f"latentdiff_pictures_total {served.studio.worker.count:.1f}" in text


def test_a_port_in_use_is_refused(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = call("serve", "--port", taken.getsockname()[1])
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert "cannot listen at 127.0.0.1" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--host", "0.0.0.0"), 7, "--host 0.0.0.0 needs --token or LATENTDIFF_TOKEN"),
        (("--host", "example.org"), 7, "--host example.org needs --token or LATENTDIFF_TOKEN"),
        (("--token", "short"), 2, "a token must have at least 8"),
        (("--token", "p\u00e4ssw\u00f6rter"), 2, "printable ASCII"),
        (("--models", "nowhere"), 2, "no such folder (nowhere)"),
        (("--port", 0), 2, "--port"),
        (("-m", "nowhere"), 4, "no such model folder (nowhere)"),
        (("-o", "file"), 2, "file is a file. Name a folder"),
    ],
)
def test_starts_that_are_refused(call, tmp_path, words, code, message):
    (tmp_path / "file").touch()
    ended, out, err = call("serve", *words)
    assert (ended, out, err.count("\n")) == (code, "", 1)
    assert message in err


SOUND = {
    "/v1/images/generations": {"prompt": "a ring", "n": 1, "size": "64x64", "response_format": "url", "seed": 1},
    "/sdapi/v1/txt2img": {"prompt": "a ring", "seed": 1, "batch_size": 1, "subseed": 2, "subseed_strength": 0.5},
    "/sdapi/v1/img2img": {"prompt": "a ring", "init_images": ["AAAA"], "mask": "AAAA", "mask_blur": 2},
    "/sdapi/v1/options": {"sd_model_checkpoint": "scenes-tiny"},
    "/sdapi/v1/png-info": {"image": "AAAA"},
    "/sdapi/v1/extra-single-image": {"image": "AAAA", "upscaling_resize": 2, "upscaler_1": "Lanczos"},
    "/api/draw": {
        "settings": {"prompt": "a ring", "num_inference_steps": 1},
        "model": "scenes-tiny",
        "margins": [0] * 4,
    },
    "/api/read": {"image": "AAAA"},
}
ODD = [None, "", -1, 0, 1e308, 10**30, True, [], {}, [[]], "\0", "\ud800", "x" * 5000, float("nan"), {"a": 1}, "../.."]


MORE = ["strength", "sampler", "width", "eta", "hires_scale", "alwayson_scripts", "adapters", "\u2603", "__class__"]


def mutated(body, rng):
    """The body with one to three of its values, or a new key, replaced by odd ones; also inside its trees."""
    body = {**body, "num_inference_steps": 1, "steps": 1} if "settings" not in body else dict(body)
    for _ in range(rng.integers(1, 4)):
        names = [*body, *MORE] if "settings" not in body else [*body]
        name = names[rng.integers(len(names))]
        if isinstance(body.get(name), dict):
            body[name] = mutated(body[name], rng)
        else:
            body[name] = ODD[rng.integers(len(ODD))]
    return body


def megabytes():
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.parametrize("path", SOUND)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_bodies(served, path, count, connections):
    """Every answer is a picture or a refusal in a line, never a failure; memory stays, and no other host is asked."""
    rng = np.random.default_rng(len(path))
    before = megabytes()
    with httpx.Client(verify=False, base_url=served.address, timeout=60) as client:
        for k in range(count):
            content = json.dumps(mutated(SOUND[path], rng)).encode()
            cut = content[: rng.integers(len(content))] if rng.random() < 0.2 else content
            answer = client.post(path, content=cut, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 422), (answer.status_code, content[:300], answer.text[:300])
            if answer.status_code == 422:
                assert "\n" not in answer.json()["error"]["message"]
            before = megabytes() if k == count // 4 else before  # until then buffers are made
    assert megabytes() < before + 60
    assert connections <= {"127.0.0.1"}


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations"])
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_forms(served, path, count, photo, connections):
    """The same of multipart bodies, whose pictures are damaged too."""
    rng = np.random.default_rng(len(path))
    picture = png(photo)
    with httpx.Client(verify=False, base_url=served.address, timeout=60) as client:
        for _ in range(count):
            fields = mutated({"prompt": "a ring", "n": 1, "size": "64x64"}, rng)
            texts = {key: text if isinstance(text, str) else json.dumps(text) for key, text in fields.items()}
            texts = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in texts.items()}
            damaged = bytearray(picture)
            for place in rng.integers(len(picture), size=rng.integers(0, 4)):
                damaged[place] = rng.integers(256)
            names = ("image", "mask", "image[]", "other")
            files = [(names[k], ("a.png", bytes(damaged))) for k in range(rng.integers(1, 4))]
            answer = client.post(path, data=texts, files=files)
            assert answer.status_code in (200, 404, 422), (answer.status_code, texts, answer.text[:300])
            if answer.status_code != 200:
                assert "\n" not in answer.json()["error"]["message"]
    assert connections <= {"127.0.0.1"}


# the command


def test_the_command_from_start_to_signal(tiny_model, tmp_path, call):
    """It draws what `generate` draws, to the bit; after SIGTERM under load no half file is left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Started("serve", "-m", tiny_model, "--port", port, "--runtime", "torch", cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    wait_for(lambda: get(f"{address}/health").status_code == 200)
    assert f"scenes-tiny at {address}, for programs at {address}/v1; pictures go to outputs" in server.err.read_text()
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="not used", max_retries=0)
    answer = client.images.generate(prompt=PROMPT, n=2, extra_body=QUICK)
    words = ("generate", PROMPT, "-m", tiny_model, "--steps", 4, "-s", 7, "-N", 2, "--runtime", "torch", "-o", "own")
    assert call(*words)[0] == 0
    for item, path in zip(answer.data, sorted((tmp_path / "own").iterdir()), strict=True):
        np.testing.assert_array_equal(decoded(item), np.asarray(Image.open(path)))
    answers = []

    def ask(seed):
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": 200}
        answers.append(post(f"{address}/v1/images/generations", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    wait_for(lambda: get(f"{address}/health").json()["waiting"] > 0)
    assert len(get(f"{address}/api/history").json()["pictures"]) >= 2
    server.process.terminate()
    code, err = server.ended(60)
    for thread in threads:
        thread.join()
    assert (code, err.splitlines()[-1]) == (143, "error: terminated"), err
    assert set(answers) <= {200, 503}
    assert 503 in answers
    pictures = sorted((tmp_path / "outputs").glob("*.png"))
    assert {path.suffix for path in (tmp_path / "outputs").iterdir()} <= {".png", ".sqlite"}, "no half file"
    for path in pictures:
        with Image.open(path) as image:
            image.load()
    again = Started("serve", "-m", tiny_model, "--port", port, "--runtime", "torch", cwd=tmp_path)
    wait_for(lambda: get(f"{address}/health").status_code == 200)
    history = get(f"{address}/api/history", params={"count": 200}).json()["pictures"]
    again.process.terminate()
    assert again.ended(60)[0] == 143
    assert sorted(each["name"] for each in history) == [path.name for path in pictures], "the history is right"


def test_the_examples_of_the_manual(served, tmp_path, monkeypatch):
    """Its Python and its curl, at this server's address."""
    page = (ROOT / "docs" / "guides" / "serve.md").read_text()
    monkeypatch.chdir(tmp_path)
    port = served.address.rpartition(":")[2]
    python = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(python) == 2
    for block in python:
        assert "7860" in block
        exec(compile(block.replace("7860", port), "serve.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"star-0.png", "star-1.png", "rings.png"}
    (curl,) = re.findall(r"^\$ (curl .*)$", page, re.M)
    answer = subprocess.run(shlex.split(curl.replace("7860", port)), capture_output=True, text=True, check=True)
    assert get(json.loads(answer.stdout)["data"][0]["url"]).status_code == 200


def wait_for(is_true, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if is_true():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen")
