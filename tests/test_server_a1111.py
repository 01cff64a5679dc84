"""A1111's API, by the client that people use for it."""

import asyncio
import base64
import io
import json
import threading
import time

import numpy as np
import pytest
import torch
import webuiapi
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.annotators import canny
from latentdiff.drawing.draw import Drawing, canvas_of, jobs_of
from latentdiff.drawing.record import parameters_text
from latentdiff.networks.controls.controlnet import ControlNet
from latentdiff.server.controls import controls_of
from latentdiff.server.shelf import Shelf
from latentdiff.server.work import PictureFile, Ticket, Worker

from .serving import PROMPT, Served, png, post

QUICK = {"steps": 4, "seed": 7, "width": 64, "height": 64, "cfg_scale": 2.0, "sampler_name": "DDIM"}
OURS = {"num_inference_steps": 4, "seed": 7, "guidance_scale": 2.0, "sampler": "ddim"}

SMALL = base64.b64encode(png(Image.new("L", (9, 9)))).decode()


def unit(**fields):
    """A body with one unit of the ControlNet extension."""
    return {"prompt": "a", "alwayson_scripts": {"controlnet": {"args": [fields]}}}


@pytest.fixture(scope="module")
def client(served):
    host, port = served.address.removeprefix("http://").split(":")
    return webuiapi.WebUIApi(host=host, port=int(port), sampler="DDIM", steps=4)


def test_text_to_picture(client, tiny):
    """To the bit; `info` is a string of JSON with a seed and an infotext of each picture."""
    result = client.txt2img(prompt=PROMPT, negative_prompt="a star", n_iter=2, **QUICK)
    expected = tiny(PROMPT, negative_prompt="a star", num_images_per_prompt=2, batch_size=1, **OURS)
    assert len(result.images) == 2
    for image, own in zip(result.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(own))
    assert isinstance(result.json["info"], str)
    info = json.loads(result.json["info"])
    assert (info["all_seeds"], info["sd_model_name"]) == ([7, 8], "scenes-tiny")
    assert info["infotexts"] == [parameters_text(record) for record in expected.metadata]


def test_variations_and_two_passes(client, tiny):
    varied = client.txt2img(prompt=PROMPT, subseed=3, subseed_strength=0.5, batch_size=2, **QUICK)
    expected = tiny(PROMPT, variation_seed=3, variation_strength=0.5, num_images_per_prompt=2, batch_size=2, **OURS)
    for image, own in zip(varied.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(own))
    assert (varied.info["all_seeds"], varied.info["all_subseeds"]) == ([7, 7], [3, 4])
    large = client.txt2img(prompt=PROMPT, enable_hr=True, hr_scale=1.5, denoising_strength=0.5, **QUICK)
    (own,) = tiny(PROMPT, hires_scale=1.5, hires_strength=0.5, width=64, height=64, **OURS).images
    np.testing.assert_array_equal(np.asarray(large.image), np.asarray(own))
    assert (large.info["width"], large.info["height"]) == own.size == (96, 96)


@pytest.mark.parametrize("inverted", [0, 1])
def test_picture_to_picture_with_a_mask(client, tiny, photo, inverted):
    """White is redrawn, or with `inpainting_mask_invert` black."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    result = client.img2img(
        images=[photo], prompt="two pink rings", denoising_strength=0.8, mask_image=Image.fromarray(mask), mask_blur=2,
        inpaint_full_res=False, inpainting_mask_invert=inverted, **QUICK,
    )  # fmt: skip
    own_mask = 255 - mask if inverted else mask
    (expected,) = tiny("two pink rings", image=photo, mask_image=own_mask, mask_blur=2.0, strength=0.8, **OURS).images
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(expected))


def test_only_masked(client, tiny, photo):
    """`inpaint_full_res`, which clients send by default: the masked part is drawn at the size of the request."""
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:40] = 255
    result = client.img2img(
        images=[photo], prompt="a ring", denoising_strength=0.8, mask_image=Image.fromarray(mask), mask_blur=0,
        inpaint_full_res_padding=4, **QUICK,
    )  # fmt: skip
    own = {"padding_mask_crop": 4, "strength": 0.8, "width": 64, "height": 64}
    (expected,) = tiny("a ring", image=photo, mask_image=mask, **own, **OURS).images
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(expected))
    assert "Inpaint area: Only masked, Masked area padding: 4" in result.info["infotexts"][0]


def test_samplers_of_the_list_are_taken(client, tiny):
    names = [row["name"] for row in client.get_samplers()]
    assert {"Euler a", "DPM++ 2M", "DDIM", "UniPC"} <= set(names)
    karras = next(row for row in client.get_schedulers() if row["label"] == "Karras")
    result = client.txt2img(prompt=PROMPT, scheduler=karras["label"], **{**QUICK, "sampler_name": "DPM++ 2M"})
    (expected,) = tiny(PROMPT, **{**OURS, "sampler": "dpmpp_2m", "spacing": "karras"}).images
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(expected))
    with pytest.raises(RuntimeError, match="unknown sampler"):
        client.txt2img(prompt=PROMPT, **{**QUICK, "sampler_name": "Magic"})


def test_lists_options_and_models(client):
    (model,) = client.get_sd_models()
    assert model["title"] == client.util_get_current_model() == f"scenes-tiny [{model['hash']}]"
    client.set_options({"sd_model_checkpoint": model["title"]})
    assert client.util_get_sampler_names()
    for name in ("get_loras", "get_sd_vae", "get_hypernetworks", "get_face_restorers", "get_prompt_styles"):
        assert list(getattr(client, name)()) == []
    assert [row["name"] for row in client.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert client.get_memory()["ram"]["total"] > 2**30
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_cmd_flags()["api"]
    assert client.refresh_checkpoints() == {}


def test_the_text_in_a_picture_and_a_larger_picture(client, tiny, photo):
    out = client.txt2img(prompt=PROMPT, **QUICK)
    assert client.png_info(out.image).info == out.info["infotexts"][0]
    large = client.extra_single_image(photo, upscaling_resize=2, upscaler_1="Nearest").image
    np.testing.assert_array_equal(np.asarray(large), np.asarray(photo).repeat(2, 0).repeat(2, 1))


def test_progress_and_interruption(served, client):
    """At rest all is 0; while it draws there is a preview; interrupted, the answer has what is drawn."""
    rest = client.get_progress()
    assert (rest["progress"], rest["state"]["job_count"], rest["current_image"]) == (0.0, 0, None)
    results = []
    body = {"prompt": PROMPT, "steps": 1000, "n_iter": 2, "sampler_name": "DDIM", "width": 64, "height": 64}
    address = f"{served.address}/sdapi/v1/txt2img"
    asking = threading.Thread(target=lambda: results.append(post(address, json=body, timeout=60)))
    asking.start()
    end = time.monotonic() + 30
    while not (now := client.get_progress())["current_image"]:
        assert time.monotonic() < end
    assert 0 < now["progress"] < 1
    assert now["state"]["sampling_steps"] == 2000
    assert now["eta_relative"] > 0
    assert Image.open(io.BytesIO(base64.b64decode(now["current_image"]))).size == (64, 64)
    client.interrupt()
    asking.join(30)
    assert (results[0].status_code, results[0].json()["images"]) == (200, [])
    end = time.monotonic() + 30
    while client.get_progress()["progress"]:  # the answer does not wait for the step in hand
        assert time.monotonic() < end


def test_a_token_as_a_password(tiny, tmp_path):
    with Served(tiny, tmp_path / "out", hosts=None, token="long enough") as server:
        host, port = server.address.removeprefix("http://").split(":")
        known = webuiapi.WebUIApi(host=host, port=int(port), username="anybody", password="long enough")
        assert known.get_sd_models()[0]["model_name"] == "scenes-tiny"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("txt2img", {"prompt": "a", "tiling": True}, "tiling is not supported"),
        ("txt2img", {"prompt": "a", "script_name": "x"}, "script_name is not supported"),
        ("txt2img", {"prompt": "a", "alwayson_scripts": {"roop": {"args": [1]}}}, "alwayson_scripts is not supported"),
        ("txt2img", {"prompt": "a", "alwayson_scripts": [1]}, "alwayson_scripts must be an object"),
        ("txt2img", unit(model="canny", image=SMALL), "unknown ControlNet 'canny'; no folder of ControlNets"),
        ("txt2img", unit(model="canny"), "a unit requires an image"),
        ("txt2img", unit(model="canny", image=SMALL, module="openpose"), "unknown module 'openpose'; none or one of"),
        ("txt2img", unit(model="canny", image=SMALL, control_mode="My prompt is more important"), "use Balanced"),
        ("txt2img", unit(model="canny", image=SMALL, mask=SMALL), "mask is not supported"),
        ("txt2img", unit(model="canny", image=SMALL, guessmode=True), "guessmode is not supported"),
        ("txt2img", unit(model="canny", image=SMALL, weight="much"), "controlnet: weight"),
        ("txt2img", unit(model="canny", image="/etc/passwd"), "a picture must be in base64"),
        ("txt2img", {"prompt": "a", "s_churn": 1}, "s_churn is not supported"),
        ("txt2img", {"prompt": "a", "seed_resize_from_w": 64}, "seed_resize_from_w is not supported"),
        ("txt2img", {"prompt": "a", "enable_hr": True, "hr_resize_x": 256}, "hr_resize_x is not supported"),
        ("txt2img", {"prompt": "a", "override_settings": {"sd_vae": "x"}}, "override_settings.sd_vae is not supported"),
        ("txt2img", {"prompt": "a", "override_settings": {"CLIP_stop_at_last_layers": "2"}}, "must be a whole number"),
        ("img2img", {"init_images": [SMALL], "resize_mode": 1}, "resize_mode is not supported"),
        ("options", {"CLIP_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers cannot be changed here"),
        ("extra-single-image", {"image": SMALL, "upscaler_1": []}, "unknown upscaler"),
        ("extra-single-image", {"image": SMALL, "upscaling_resize": 10**400, "upscaler_1": "Lanczos"}, "at most 16"),
        ("txt2img", {"prompt": "a", "steps": 0}, "num_inference_steps: "),
        ("txt2img", {"prompt": "a", "batch_size": 10**6}, "batch_size: "),
        ("txt2img", {"prompt": "a", "n_iter": 64, "batch_size": 64}, "at most 64 pictures"),
        ("txt2img", {"prompt": "a <lora:ink:0.8>"}, "unknown adapter 'ink'; no folder of adapters"),
        ("img2img", {"prompt": "a"}, "init_images must be one picture (got 0)"),
        ("img2img", {"init_images": ["http://169.254.169.254/"]}, "addresses are never fetched"),
        ("img2img", {"init_images": ["file:///etc/passwd"]}, "addresses are never fetched"),
        ("png-info", {"image": "!"}, "a picture must be in base64"),
        ("png-info", {"image": "AAAA"}, "not an image: starts with 00 00 00"),
        ("extra-single-image", {"image": SMALL, "upscaling_resize": 1e9, "upscaler_1": "Lanczos"}, "and at most 16"),
        ("options", {"sd_model_checkpoint": "/etc/passwd"}, "unknown model '/etc/passwd'; one of"),
    ],
)  # fmt: skip
def test_what_is_refused(served, path, body, message):
    answer = served.post(f"/sdapi/v1/{path}", body)
    assert (answer.status_code, message in answer.json()["detail"]) == (422, True), answer.text


def test_unknown_settings_are_named(served):
    body = {"prompt": "a", "steps": 1, "stepz": 9, "s_min_uncond": 0, "mask_image": "x", "bé": 1}
    answer = served.post("/sdapi/v1/txt2img", body)
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, "b?, mask_image, stepz")
    answer = served.post(
        "/sdapi/v1/extra-single-image", {"image": SMALL, "gfpgan_visibility": 1, "codeformer_weight": 0}
    )
    assert (answer.status_code, answer.headers["x-ignored"]) == (200, "gfpgan_visibility")
    controls = controls_of(unit(image=SMALL, model="edges", pixel_perfect=True, resize_mode=0)["alwayson_scripts"])
    assert controls.unread == ("controlnet.pixel_perfect",)


def test_progress_is_that_of_the_own_pictures(tiny, tmp_path):
    """Two clients whose pictures share a batch see their own; a third sees nothing, and cancels nothing."""
    request = tiny.request("a", num_inference_steps=2, seed=1, num_images=2, batch_size=2)
    jobs = jobs_of(tiny.model, request, canvas_of(tiny.model, request, None, None))
    seen = {}

    async def ask(worker):
        tickets = [worker.submit(Ticket(tiny.painter, [job], f"{n}", interruptible=True)) for n, job in enumerate(jobs)]

        def look(image, record):
            if not seen:
                seen.update({n: (worker.current(f"{n}"), worker.preview(f"{n}")) for n in range(3)})
                worker.interrupt("2")
                worker.interrupt("1")
            return PictureFile("a.png", b"")

        worker._finish = look
        worker.start()
        async for _ in tickets[0].events():
            pass
        return tickets

    worker = Worker(None)
    first, second = asyncio.run(ask(worker))
    worker.stop()
    assert (seen[0][0], seen[1][0], seen[2]) == ([first], [second], ([], None))
    own, other = (np.asarray(seen[n][1]) for n in (0, 1))
    assert (own != other).any()
    assert (first.cancelled, second.cancelled) == (False, True)


def test_a_transparent_mask_redraws_nothing_there(served, tiny, photo):
    """As under `--mask`: what is transparent is black."""
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[:16] = 255
    body = {"prompt": "a ring", "steps": 4, "seed": 7, "init_images": [coded(photo)], "mask_blur": 0}
    answer = served.post("/sdapi/v1/img2img", body | {"mask": coded(Image.fromarray(mask))}).json()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))))
    np.testing.assert_array_equal(picture[16:], np.asarray(photo)[16:])


def coded(image):
    return base64.b64encode(png(image)).decode()


def test_interruption_leaves_other_clients_alone(served, tiny):
    """Only what A1111's clients draw is interrupted; one that is interrupted in its last step is answered too."""
    own, others = [], []
    body = {"prompt": PROMPT, "num_inference_steps": 60, "seed": 1}
    threads = [
        threading.Thread(target=lambda: others.append(served.post("/v1/images/generations", body))),
        threading.Thread(target=lambda: own.append(served.post("/sdapi/v1/txt2img", {"prompt": "a", "steps": 1000}))),
    ]
    for thread in threads:
        thread.start()
    while not own:
        served.post("/sdapi/v1/interrupt")
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert (others[0].status_code, own[0].status_code) == (200, 200)
    assert own[0].json()["images"] == []


def test_a_picture_that_is_interrupted_while_it_is_decoded(tiny, tmp_path, monkeypatch):
    """Its client gets an answer without it."""
    with Served(tiny, tmp_path / "out") as server:
        finish = Drawing.finish

        def interrupted(self, *arguments):
            server.studio.worker.interrupt("127.0.0.1")
            return finish(self, *arguments)

        monkeypatch.setattr(Drawing, "finish", interrupted)
        answer = server.post("/sdapi/v1/txt2img", {"prompt": "a", "steps": 2, "batch_size": 1, "n_iter": 3})
        assert (answer.status_code, answer.json()["images"]) == (200, [])


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', "[" * 300 + "]" * 300])
def test_odd_texts_in_a_picture(served, text):
    info = PngInfo()
    info.add_text("workflow", text)
    content = io.BytesIO()
    Image.new("L", (9, 9)).save(content, "PNG", pnginfo=info)
    answer = served.post("/sdapi/v1/png-info", {"image": base64.b64encode(content.getvalue()).decode()})
    assert answer.status_code == 200
    assert json.loads(answer.json()["items"]["workflow"]) == json.loads(text)


def test_controls(tiny_model, tmp_path, photo):
    """Units as the client sends them draw what `control_image` draws; a unit without a model is none."""
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")
    unet = pipe.model.backbone
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = ControlNet.create(unet.model, pipe.model.codec.factor)
        for parameter in control.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    control.save(tmp_path / "controls" / "edges")

    def opened(*_):
        return LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")

    shelf = Shelf(pipe, opened, controls=tmp_path / "controls")
    own = opened()
    own.load_controlnet(tmp_path / "controls" / "edges")
    steered = {"control_image": canny(np.asarray(photo)), "controlnet_conditioning_scale": 0.7}
    expected = own(PROMPT, **OURS, **steered, control_guidance_end=0.8).images[0]
    plain = pipe(PROMPT, **OURS).images[0]
    with Served(pipe, tmp_path / "out", shelf=shelf) as server:
        host, port = server.address.removeprefix("http://").split(":")
        client = webuiapi.WebUIApi(host=host, port=int(port), sampler="DDIM", steps=4)
        assert client.controlnet_model_list() == ["edges"]
        assert "canny" in client.controlnet_module_list()
        of_ours = webuiapi.ControlNetUnit(
            image=photo, module="canny", model="edges [12345678]", weight=0.7, guidance_end=0.8
        )
        picture = client.txt2img(prompt=PROMPT, controlnet_units=[of_ours], **QUICK)
        empty = client.txt2img(prompt=PROMPT, controlnet_units=[webuiapi.ControlNetUnit(image=photo)], **QUICK)
    np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(empty.image), np.asarray(plain))
    assert (np.asarray(picture.image) != np.asarray(plain)).any()
