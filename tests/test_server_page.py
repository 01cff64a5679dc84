"""The web page in a real Chromium: drawing, cancelling, painting, the history, training runs; and what it may load."""

import base64
import io
import json
import os
import re
import shutil
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.server.shelf import Shelf

from .serving import PROMPT, Served, get, png
from .test_few_steps import factors
from .test_server_shelf import opened, places  # noqa: F401 - a fixture

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=20_000)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
HOSTILE = '<img src=x onerror="alert(1)"> a "red" ring'


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """A folder with a finished run and a broken one."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_run, folder / "tiny", ignore=shutil.ignore_patterns("checkpoints", "cache", "model"))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.toml").write_text("nonsense")
    return folder


@pytest.fixture(scope="module")
def shop(tiny, tiny_model, places, runs, tmp_path_factory):  # noqa: F811
    shelf = Shelf(tiny, lambda path, _: opened(tiny_model if path is None else path), *places)
    with Served(tiny, tmp_path_factory.mktemp("page") / "outputs", shelf=shelf, runs=runs) as server:
        yield server


@pytest.fixture
def page(browser, shop):
    """The page, opened; at the end nothing was written to the console, and no other host was asked."""
    with opened_page(browser, shop.address) as page:
        yield page


def opened_page(browser, address, **settings):
    return _Opened(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings}), address)


class _Opened:
    def __init__(self, context, address):
        self.context, self.address, self.complaints = context, address, []

    def __enter__(self):
        page = self.context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", self._note_request)
        page.goto(self.address)
        expect(page.locator("#model")).to_have_value("scenes-tiny")
        return page

    def __exit__(self, *failure):
        self.context.close()
        assert failure[0] or self.complaints == []

    def _note_request(self, request):
        if not request.url.startswith((self.address, "data:", f"blob:{self.address}")):
            self.complaints.append(request.url)


def ask(page, prompt, **fields):
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def draw(page, count):
    """Press Draw, and wait for so many new pictures."""
    before = page.locator("#gallery figure").count()
    page.click("#go")
    arrived(page, before + count)


def arrived(page, count):
    expect(page.locator("#gallery figure:not(.waiting) img")).to_have_count(count)
    expect(page.locator("#cancel")).to_be_hidden()


def wait_until(page, holds):
    """Let the page go on until the condition holds, 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def pixels(shop, page, place=0):
    """What a picture of the gallery shows, from its address."""
    address = page.locator("#gallery figure img").nth(place).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(get(shop.address + address).content)))


def test_draw_with_previews(page, shop, tiny):
    """Previews come while it draws, a bar says how far it is, and the pictures are the pipeline's to the bit."""
    ask(page, PROMPT, num_images=2, seed=7, num_inference_steps=150, previews=20)
    page.click("#go")
    expect(page.locator("#gallery figure.waiting")).to_have_count(2)
    expect(page.locator("figure.waiting img[src^='data:image/png']").first).to_be_visible()
    expect(page.locator("#steps")).to_have_text(re.compile(r"\d+ of 300 steps, [\d.]+ s left"))
    share = page.locator("#progress").evaluate("bar => bar.value")
    assert 0 < share < 1
    arrived(page, 2)
    expect(page.locator("#state")).to_have_text(re.compile(r"2 pictures in [\d.]+ s"))
    expected = tiny(PROMPT, num_images_per_prompt=2, seed=7, num_inference_steps=150).images
    for place in range(2):
        np.testing.assert_array_equal(pixels(shop, page, place), np.asarray(expected[place]))


def test_sketches_while_typing(browser, page, tiny_model, tmp_path):
    """A model with a student draws with every letter, always from the same noise; nothing is kept."""
    expect(page.locator("#live-choice")).to_be_hidden()
    place = shutil.copytree(tiny_model, tmp_path / "model")
    (place / "few_steps").mkdir()
    load = partial(LatentDiffusionPipeline.from_pretrained, place, device="cpu", runtime="torch")
    save_file(factors(load().model, 0), place / "few_steps" / "pytorch_lora_weights.safetensors")
    student = load()
    student.load_few_steps()
    served = Served(load(), tmp_path / "outputs", shelf=Shelf(load(), lambda *_: load()))
    with served as server, opened_page(browser, server.address) as sketching:
        sketching.locator("#live").check()
        ask(sketching, "", seed=5)
        sketching.locator("#prompt").press_sequentially(PROMPT)
        expect(sketching.locator("#sketch")).to_have_attribute("alt", f"A sketch of: {PROMPT}")
        data = sketching.locator("#sketch").get_attribute("src").partition(",")[2]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        np.testing.assert_array_equal(picture, np.asarray(student(PROMPT, seed=5).images[0]))
        assert list((tmp_path / "outputs").glob("*.png")) == []
        held = []
        sketching.route("**/api/live", lambda route: held.append(route))
        with sketching.expect_request("**/api/live"):
            sketching.locator("#prompt").fill("a star")
        sketching.locator("#prompt").fill("")
        with sketching.expect_response("**/api/live"):
            held[0].continue_()
        sketching.wait_for_timeout(200)
        expect(sketching.locator("#sketch")).to_be_hidden()  # of a prompt that is erased
        sketching.unroute("**/api/live")
        sketching.locator("#prompt").fill(PROMPT)
        expect(sketching.locator("#sketch")).to_be_visible()
        sketching.locator("#live").uncheck()
        expect(sketching.locator("#sketch")).to_be_hidden()


def test_cancel(page, shop):
    ask(page, PROMPT, num_images=4, num_inference_steps=1000)
    page.click("#go")
    expect(page.locator("#steps")).to_have_text(re.compile("of 4000 steps"))
    page.focus("#cancel")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(page.locator("#go")).to_be_focused()
    expect(page.locator("#gallery figure")).to_have_count(0)
    wait_until(page, lambda: not shop.studio.worker.current())


def test_by_keyboard(page):
    """The prompt has the focus at first; every control can be reached, and Ctrl+Enter draws."""
    page.keyboard.type("a ring")
    page.keyboard.press("Tab")
    expect(page.locator("#go")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first fold
    page.keyboard.press("Tab")
    page.keyboard.type("1")  # in place of the 4 that is selected
    expect(page.locator("#num_images")).to_have_value("1")
    page.fill("#num_inference_steps", "2") if page.locator("#sampling-fold").evaluate("e => (e.open = true)") else None
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    arrived(page, 1)
    page.focus("#gallery .frame")
    page.keyboard.press("Enter")
    expect(page.locator("#large")).to_be_visible()
    expect(page.locator("#large-facts")).to_contain_text("a ring")
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()


def test_paint_a_mask_and_redraw(page, shop, photo):
    """Outside the painted part every pixel is the given picture's, inside it is drawn anew."""
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    canvas = page.locator("#paper canvas")
    expect(canvas).to_be_visible()
    expect(page.locator("#state")).to_have_text("Drawing starts from this picture.")
    page.check("#painting")
    page.locator("#brush").evaluate("range => (range.value = 25)")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    ask(page, "a blue square", num_images=1, seed=5, num_inference_steps=4)
    draw(page, 1)
    picture, given = pixels(shop, page), np.asarray(photo)
    width = given.shape[1]
    np.testing.assert_array_equal(picture[:, width // 2 :], given[:, width // 2 :])
    assert (picture[:, : width // 4] != given[:, : width // 4]).mean() > 0.2
    page.click("#clear")
    draw(page, 1)
    assert (pixels(shop, page)[:, width // 2 :] != given[:, width // 2 :]).any()  # without a mask all is drawn over
    page.click("#without")
    expect(canvas).to_have_count(0)


def test_paint_by_keyboard_and_extend(page, shop, photo):
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    canvas = page.locator("#paper canvas")
    canvas.focus()
    for key in ("ArrowLeft", "ArrowUp", "Space"):
        page.keyboard.press(key)
    expect(canvas).to_have_attribute("title", "Brush at 48%, 48%")
    ring, box = page.locator("#paper .brush").bounding_box(), canvas.bounding_box()
    assert ring["x"] + ring["width"] / 2 == pytest.approx(box["x"] + 0.48 * box["width"], abs=2)
    assert ring["width"] == pytest.approx(0.2 * box["width"], abs=2)
    assert canvas.evaluate("c => c.getContext('2d').getImageData(c.width * .48, c.height * .48, 1, 1).data[3]") > 0
    ask(page, "a ring", num_images=1, num_inference_steps=2, left=16, bottom=8)
    draw(page, 1)
    picture, given = pixels(shop, page), np.asarray(photo)
    height, width = given.shape[:2]
    assert picture.shape == (height + 8, width + 16, 3)
    np.testing.assert_array_equal(picture[:8, 16:], given[:8])  # above the painted middle


def test_settings_are_read_back(page, shop, tiny):
    """From a picture's file into the form, and the form draws the picture again, to the bit; seeds have 64 bits."""
    seed = 2**64 - 3
    settings = {"num_inference_steps": 3, "guidance_scale": 3.25, "sampler": "euler", "guidance_rescale": 0.5}
    out = tiny(PROMPT, seed=seed, negative_prompt="blue", **settings)
    from latentdiff.drawing.files import encoded

    data = encoded(out.images[0], ".png", out.metadata[0])
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": data})
    page.click("text=Use its settings instead")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    values = {"seed": str(seed), "guidance_scale": "3.25", "sampler": "euler", "negative_prompt": "blue", "width": ""}
    for name, value in values.items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    expect(page.locator("#further")).to_have_value("guidance_rescale = 0.5")
    draw(page, 1)
    np.testing.assert_array_equal(pixels(shop, page), np.asarray(out.images[0]))


def test_variations_and_a_larger_picture(page, shop, tiny):
    ask(page, PROMPT, num_images=1, seed=9, num_inference_steps=4)
    draw(page, 1)
    page.locator("#gallery button:text('Larger')").click()
    arrived(page, 2)
    larger = tiny(PROMPT, seed=9, num_inference_steps=4, hires_scale=2.0).images[0]
    np.testing.assert_array_equal(pixels(shop, page), np.asarray(larger))
    page.locator("#gallery button:text('Vary')").last.click()  # of the first picture
    arrived(page, 6)
    name = page.locator("#gallery figure img").first.get_attribute("src").rpartition("/")[2].partition("?")[0]
    record = json.loads(Image.open(shop.studio.folder / name).text["latentdiff"])["request"]
    varied = {key: record[key] for key in ("variation_seed", "variation_strength")}
    again = tiny(PROMPT, num_images_per_prompt=4, seed=9, num_inference_steps=4, **varied)  # in one batch, as drawn
    for place in range(4):
        np.testing.assert_array_equal(pixels(shop, page, place), np.asarray(again.images[place]))
    page.locator("#gallery button:text('Vary')").first.click()  # a variation is varied by drawing over it
    arrived(page, 10)


def test_models_and_adapters(page, shop, places):  # noqa: F811
    """Another model draws what its own pipeline draws, and with an adapter what `load_lora_weights` draws."""
    page.select_option("#model", "other")
    expect(page.locator("#state")).to_have_text("")
    ask(page, PROMPT, num_images=1, seed=2, num_inference_steps=2)
    draw(page, 1)
    pipe = LatentDiffusionPipeline.from_pretrained(places[0] / "other", device="cpu", runtime="torch")
    plain = np.asarray(pipe(PROMPT, seed=2, num_inference_steps=2).images[0])
    np.testing.assert_array_equal(pixels(shop, page), plain)
    page.check("#use-ink")
    page.fill("#weight-ink", "0.7")
    draw(page, 1)
    pipe.load_lora_weights(places[1] / "ink.safetensors", weight=0.7, fuse=True)
    np.testing.assert_array_equal(pixels(shop, page), np.asarray(pipe(PROMPT, seed=2, num_inference_steps=2).images[0]))
    page.uncheck("#use-ink")
    page.select_option("#model", "scenes-tiny")
    page.locator("#gallery button:text('Settings')").first.click()
    expect(page.locator("#model")).to_have_value("other")
    expect(page.locator("#use-ink")).to_be_checked()
    expect(page.locator("#weight-ink")).to_have_value("0.7")


def test_what_the_page_must_not_change_silently(page, shop, photo):
    """A picture of a model or an adapter that is gone is not varied; a further setting that has a field is refused."""
    record = {"settings": {}, "model": "gone", "hash": "", "adapters": [], "size": [64, 64], "from_picture": False}
    messages = page.evaluate(
        """async (record) => {
            const { requestOf } = await import("/page/settings.js");
            const messages = [];
            for (const changed of [{}, { model: "scenes-tiny", adapters: [{ name: "gone", weight: 1 }] }])
                try { requestOf({ ...record, ...changed }, {}); } catch (error) { messages.push(error.message); }
            return messages;
        }""",
        record,
    )
    sentence = "which is not served here."
    assert messages == [f"It was drawn by gone, {sentence}", "It was drawn with an adapter that is not served here."]
    ask(page, PROMPT, num_images=1, num_inference_steps=1, further="seed = 9007199254740993")
    page.click("#go")
    expect(page.locator("#problem")).to_have_text("seed has a field of its own")
    page.fill("#further", "")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    page.fill("#strength", "0.5")
    page.click("#without")
    draw(page, 1)  # the strength, which nobody sees any more, is gone too


def test_an_extended_picture_keeps_its_size(page, shop, photo):
    """Vary draws over it; Larger doubles it; Settings says what is to be chosen again."""
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    expect(page.locator("#paper canvas")).to_be_visible()
    ask(page, "a ring", num_images=1, num_inference_steps=3, width=64, height=64, left=32)
    draw(page, 1)
    page.locator("#gallery button:text('Vary')").first.click()
    arrived(page, 5)
    assert pixels(shop, page).shape == (64, 96, 3)
    page.locator("#gallery button:text('Larger')").last.click()
    arrived(page, 6)
    assert pixels(shop, page).shape == (128, 192, 3)
    page.locator("#gallery button:text('Settings')").last.click()
    expect(page.locator("#state")).to_contain_text("set its mask and margins again")
    expect(page.locator("#paper canvas")).to_have_count(0)
    count = page.locator("#gallery figure").count()
    page.locator("#gallery button:text('Settings')").first.click()  # drawn over another, with a strength
    expect(page.locator("#strength")).to_have_value("0.4")
    page.click("#go")  # without a picture the strength has no effect
    arrived(page, count + 1)
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    expect(page.locator("#paper canvas")).to_be_visible()
    expect(page.locator("#strength")).to_have_value("0.4")


def test_choosing_a_picture(page, shop, photo):
    """A photo of a phone becomes smaller; what is no picture leaves the one before; the same file may come again."""
    large = io.BytesIO()
    Image.fromarray(np.zeros((1000, 6000, 3), np.uint8)).save(large, "JPEG")
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": large.getvalue()})
    expect(page.locator("#state")).to_contain_text("It was reduced to 5016 × 836.")
    assert page.locator("#paper img").evaluate("image => image.naturalWidth * image.naturalHeight") <= 2048 * 2048
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    expect(page.locator("#state")).to_have_text("Drawing starts from this picture.")
    before = page.locator("#paper img").get_attribute("src")
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"nothing"})
    expect(page.locator("#problem")).to_have_text("The browser cannot open this file as a picture.")
    assert page.locator("#paper img").get_attribute("src") == before
    assert page.locator("#file").input_value() == ""
    canvas = page.locator("#paper canvas")
    assert canvas.evaluate("c => getComputedStyle(c).touchAction") == "auto"  # a finger scrolls
    page.check("#painting")
    assert canvas.evaluate("c => getComputedStyle(c).touchAction") == "none"
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.up(button="right")
    assert canvas.evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.every((v) => v === 0)")


def test_a_picture_of_another_kind_is_converted(page, shop):
    """The browser opens what the server does not: it is sent as PNG. The last choice wins, however long one takes."""
    red = '<rect width="40" height="24" fill="red"/>'
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="24">{red}</svg>'.encode()
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "x.svg", "mimeType": "image/svg+xml", "buffer": drawing})
    expect(page.locator("#state")).to_have_text("Drawing starts from this picture. It was converted to PNG, 40 × 24.")
    image = base64.b64decode(page.evaluate("import('/page/paper.js').then((paper) => paper.request())")["image"])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image)).convert("RGB")), [[[255, 0, 0]] * 40] * 24)
    notes = page.evaluate(
        """async (coded) => {
            const { start } = await import("/page/paper.js");
            const large = document.createElement("canvas");
            Object.assign(large, { width: 6000, height: 1000 });
            const slow = await new Promise((resolve) => large.toBlob(resolve));
            const quick = new Blob([Uint8Array.from(atob(coded), (c) => c.charCodeAt(0))], { type: "image/png" });
            return Promise.all([start(slow), start(quick)]);
        }""",
        base64.b64encode(png(Image.new("RGB", (16, 8)))).decode(),
    )
    assert notes == [None, ""]
    assert page.locator("#paper img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [16, 8]


def test_what_is_erased_is_no_mask(page, photo):
    """A finger has no shift key: a box makes the brush erase."""
    page.locator("details").evaluate_all("folds => folds.forEach((fold) => (fold.open = true))")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": png(photo)})
    page.locator("#brush").evaluate("range => (range.value = 50)")
    canvas, masked = page.locator("#paper canvas"), []
    for erases in (False, True):
        page.locator("#erasing").set_checked(erases)
        canvas.focus()
        page.keyboard.press("Space")
        masked.append(page.evaluate("import('/page/paper.js').then((p) => p.request()).then((body) => body.mask)"))
    assert (masked[0] is not None, masked[1]) == (True, None)


def test_many_requests_leave_the_browser_a_connection(page, shop):
    """Four are sent at once; the others follow as those end, and the page can ask for something else meanwhile."""
    held = []
    page.route("**/api/draw", lambda route: held.append(route))
    ask(page, PROMPT, num_images=1, num_inference_steps=1, seed=3)
    for _ in range(7):
        page.click("#go")
    expect(page.locator("#gallery figure.waiting")).to_have_count(7)
    wait_until(page, lambda: len(held) >= 4)
    page.wait_for_timeout(200)
    assert len(held) == 4
    page.click("nav a:text('History')")
    expect(page.locator("#count")).to_have_text(re.compile(r"picture"))
    page.click("nav a:text('Draw')")
    for _ in range(7):
        wait_until(page, lambda: held)
        held.pop(0).continue_()
    arrived(page, 7)
    for _ in range(6):
        page.click("#go")
    expect(page.locator("#gallery figure.waiting")).to_have_count(6)
    page.click("#cancel")
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(page.locator("#gallery figure")).to_have_count(7)


def test_a_held_key_draws_once(page):
    requests = []
    page.route("**/api/draw", lambda route: (requests.append(route), route.continue_()))
    ask(page, PROMPT, num_images=1, num_inference_steps=1)
    page.focus("#prompt")
    page.keyboard.down("Control")
    for _ in range(5):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    page.keyboard.up("Control")
    arrived(page, 1)
    assert len(requests) == 1


def test_the_last_choice_of_a_model_wins(page, shop):
    """However long the one before takes to load."""
    waiting = []
    page.route(re.compile("/api/models/other"), lambda route: waiting.append(route))
    page.select_option("#model", "other")
    page.select_option("#model", "scenes-tiny")
    expect(page.locator("#state")).to_have_text("")
    for route in waiting:
        route.continue_()
    page.wait_for_timeout(500)
    expect(page.locator("#model")).to_have_value("scenes-tiny")


def test_a_refusal_stays_while_something_else_is_drawn(browser, shop):
    opening = opened_page(browser, shop.address)
    with opening as page:
        ask(page, PROMPT, num_images=1, num_inference_steps=1000)
        page.click("#go")
        expect(page.locator("#steps")).to_have_text(re.compile("of 1000 steps"))
        page.fill("#width", "13")
        page.click("#go")
        expect(page.locator("#problem")).to_have_text(re.compile("width must be a multiple of"))
        page.wait_for_timeout(500)
        expect(page.locator("#problem")).to_have_text(re.compile("width must be a multiple of"))
        page.click("#cancel")
        opening.complaints.clear()  # Chromium's own


@pytest.mark.slow
def test_a_model_that_does_not_load(browser, shop, places):  # noqa: F811
    """The choice goes back to the model that draws; and what is chosen is what draws, at once."""
    shutil.copytree(places[0] / "other", places[0] / "broken")
    (places[0] / "broken" / "unet" / "config.json").write_text("{}")
    opening = opened_page(browser, shop.address)
    with opening as page:
        page.select_option("#model", "broken")
        expect(page.locator("#problem")).not_to_be_empty()
        expect(page.locator("#model")).to_have_value("scenes-tiny")
        opening.complaints.clear()  # Chromium's own, of the refusal
        ask(page, PROMPT, num_images=1, num_inference_steps=1)
        page.evaluate(
            """() => {
                const model = document.getElementById("model");
                model.value = "other";
                model.dispatchEvent(new Event("change"));
                document.getElementById("go").click();
            }"""
        )
        arrived(page, 1)
        expect(page.locator("#problem")).to_be_empty()
        page.locator("#gallery .frame").click()
        expect(page.locator("#large-facts")).to_contain_text("other")
    shutil.rmtree(places[0] / "broken")


@pytest.mark.slow
def test_more_pictures_than_a_page_of_the_history(page, shop):
    for _ in range(2):
        shop.post("/v1/images/generations", {"prompt": "many", "n": 10, "num_inference_steps": 1})
    count = len(get(f"{shop.address}/api/history", params={"count": 200}).json()["pictures"])
    while count <= 48:
        shop.post("/v1/images/generations", {"prompt": "many", "n": 10, "num_inference_steps": 1})
        count += 10
    page.click("nav a:text('History')")
    expect(page.locator("#found figure")).to_have_count(48)
    page.click("#more")
    expect(page.locator("#found figure")).to_have_count(count)
    fetched = []
    page.on("request", lambda request: fetched.append(request.url) if "/pictures/" in request.url else None)
    page.locator("#found figure").last.scroll_into_view_if_needed()
    down = page.evaluate("scrollY")
    page.locator("#found button:text('Settings')").last.click()
    expect(page.locator("#prompt")).to_be_focused()
    page.wait_for_timeout(300)  # what was still being fetched
    fetched.clear()
    page.go_back()  # to the same place, and what is shown already is not fetched again
    expect(page.locator("#found figure")).to_have_count(count)
    wait_until(page, lambda: abs(page.evaluate("scrollY") - down) <= 5)
    assert fetched == []


def test_the_history(page, shop):
    """Searched as one types, opened, and all there after the page is loaded again; a prompt is never HTML."""
    ask(page, HOSTILE, num_images=1, num_inference_steps=1)
    draw(page, 1)
    ask(page, "a purple star", num_images=2)
    draw(page, 2)
    page.click("nav a:text('History')")
    page.fill("#words", "purple sta")
    expect(page.locator("#found figure")).to_have_count(2)
    page.fill("#words", "onerror")
    expect(page.locator("#found figcaption").first).to_have_text(HOSTILE)
    assert page.locator("#found figcaption img").count() == 0
    page.locator("#found .frame").first.click()
    expect(page.locator("#large-facts")).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    page.reload()
    assert page.url.endswith("#history")
    expect(page.locator("#found figure").first).to_be_visible()
    page.fill("#since", "2099-01-01")
    expect(page.locator("#count")).to_have_text("No pictures found.")
    page.fill("#since", "")
    page.fill("#words", "purple")
    page.locator("#found button:text('Settings')").first.click()
    expect(page.locator("#prompt")).to_have_value("a purple star")


@pytest.mark.slow
def test_training_runs(page, runs):
    page.click("nav a:text('Runs')")
    expect(page.locator("#run-list tr")).to_have_count(3)
    page.click("#run-list button:text('tiny')")
    expect(page.locator("#run h2")).to_have_text("tiny")
    expect(page.locator("#run svg[aria-label^='loss']").first).to_be_visible()
    log = (runs / "tiny" / "denoiser" / "log.jsonl").read_text().splitlines()
    last = [json.loads(line)["loss"] for line in log if "loss" in json.loads(line)][-1]
    label = page.locator("#run svg[aria-label^='loss']").last.get_attribute("aria-label")
    assert float(label.rpartition(" ")[2]) == pytest.approx(last, rel=0.01)
    samples = page.locator("#run figure img")
    expect(samples.first).to_be_visible()
    assert samples.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.focus("#run-list button:text('broken')")
    (runs / "newer").mkdir()
    (runs / "newer" / "config.toml").write_text("nonsense")
    expect(page.locator("#run-list tr")).to_have_count(4)  # after some seconds
    expect(page.locator("#run-list button:text('broken')")).to_be_focused()
    shutil.rmtree(runs / "newer")
    expect(page.locator("#run-list tr")).to_have_count(3)
    page.keyboard.press("Enter")
    expect(page.locator("#run .empty")).to_contain_text("config.toml: not valid TOML")
    expect(page.locator("#run-list button:text('broken')")).to_be_focused()
    shutil.copytree(runs / "broken", runs / "going")
    page.reload()
    page.click("#run-list button:text('going')")
    expect(page.locator("#run h2")).to_have_text("going")
    shutil.rmtree(runs / "going")
    expect(page.locator("#run h2")).not_to_have_text("going")  # another is shown instead
    expect(page.locator("#problem")).to_be_empty()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_screen(browser, shop, photo, width, scheme):
    """With every fold open and in every view; dark where the system is dark."""
    settings = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme}
    with opened_page(browser, shop.address, **settings) as page:
        ask(page, "a ring " + "w" * 300, num_images=3, num_inference_steps=1)
        draw(page, 3)
        page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": png(photo)})
        expect(page.locator("#paper canvas")).to_be_visible()
        for view in ("Draw", "History", "Runs"):
            page.click(f"nav a:text('{view}')")
            expect(page.locator(f"#{view.lower()}")).to_be_visible()
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        light = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
        assert (int(light) > 128) == (scheme == "light")


def test_a_refusal_is_one_sentence(browser, shop):
    opening = opened_page(browser, shop.address)
    with opening as page:
        ask(page, PROMPT, num_inference_steps=1, width=13)
        page.click("#go")
        expect(page.locator("#problem")).to_have_text(re.compile("width must be a multiple of"))
        expect(page.locator("#gallery figure")).to_have_count(0)
        (complaint,) = opening.complaints  # Chromium's own, of any refusal
        assert "422" in complaint
        opening.complaints.clear()


def test_headers_of_the_page(shop):
    """Scripts of this server alone, in no frame; the files of the page and nothing else."""
    answer = get(shop.address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    for name in ("../app.py", "%2e%2e%2fapp.py", "..%2f..%2fmodel.py", "nothing.js"):
        assert get(f"{shop.address}/page/{name}").status_code == 404
