"""`latentdiff show`: each plot shows the numbers that it says, and files are written whole or refused in one line."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline, show
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.objective import weights
from latentdiff.networks.backbones.maps import AttentionMaps, recorded_attention
from latentdiff.networks.conditions import stacked
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.show.maps import words_and_places

from .stable_diffusion import load

PROMPT = "a red circle above a blue square"
QUICK = {"seed": 1, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu")


@pytest.fixture(scope="module")
def picture(pipe):
    return np.asarray(pipe(PROMPT, seed=1).images[0])


def pictures_in(figure):
    """The arrays that a figure shows, in the order of its axes."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def test_the_schedule_has_the_models_numbers(pipe):
    scales, ratio, loss, grids = show.schedule(pipe, 10).figure.axes
    path = pipe.model.path
    alpha, sigma = (line.get_ydata() for line in scales.get_lines())
    np.testing.assert_array_equal(alpha, np.sqrt(path.alphas_cumprod))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    t, snr = ratio.get_lines()[0].get_data()
    np.testing.assert_allclose(10 ** snr[:-1], [path.level(t).snr for t in t[:-1]], rtol=1e-9)
    lines = {line.get_label(): line.get_ydata() for line in loss.get_lines()}
    np.testing.assert_array_equal(lines["min_snr"], weights(path, pipe.model.prediction, "min_snr"))
    rows = {label.get_text(): line for label, line in zip(grids.get_yticklabels(), grids.get_lines(), strict=True)}
    trailing = [level.t for level in path.levels(10, "trailing")[:-1]]
    assert rows["trailing"].get_xdata().tolist() == trailing == [999 - 100 * k for k in range(10)]


def test_the_forward_process_is_its_equation(pipe, picture):
    """First the picture; then alpha x0 + sigma noise of the same noise; at the last time, without signal, noise."""
    view = pictures_in(show.forward(pipe, picture, columns=4, seed=3).figure)
    assert len(view) == 8
    np.testing.assert_array_equal(view[0], picture)
    level = pipe.model.path.level(500)
    values, noise = picture / 127.5 - 1, view[3] / 127.5 - 1
    inside = np.abs(noise) < 0.999  # values that were not cut
    middle = view[2] / 127.5 - 1
    at = round(999 / 2)
    level = pipe.model.path.level(at)
    expected = level.alpha * values + level.sigma * noise
    apart = np.abs(middle - expected)[inside & (np.abs(expected) < 0.99)]
    assert apart.max() < 2 / 127.5, "rounding to 256 values, twice"


def test_the_reverse_process_ends_at_the_picture(pipe):
    view = pictures_in(show.reverse(pipe, PROMPT, columns=3, **QUICK).figure)
    assert len(view) == 6
    expected = np.asarray(pipe(PROMPT, **QUICK).images[0])
    for last in (view[2], view[5]):  # x_t and the guess of x0
        np.testing.assert_array_equal(last, expected)
    steps = list(pipe.stream(PROMPT, **QUICK))
    first = pipe.decode(steps[0].x0)[0].permute(1, 2, 0).numpy()
    assert np.abs(view[3] / 127.5 - 1 - first).max() < 1.01 / 255


def test_latents_are_the_encoders(pipe, picture):
    given, back, apart, *channels = pictures_in(show.latents(pipe, picture).figure)
    np.testing.assert_array_equal(given, picture)
    np.testing.assert_array_equal(channels, pipe.encode(picture[None])[0].numpy())
    expected = pipe.decode(pipe.encode(picture[None]))[0].permute(1, 2, 0).numpy()
    assert np.abs(back / 127.5 - 1 - expected).max() < 1.01 / 255
    np.testing.assert_array_equal(apart, np.clip(128 + 4 * (back.astype(int) - picture), 0, 255))


def test_samplers_are_drawn_as_asked(pipe):
    view = pictures_in(show.samplers(pipe, PROMPT, names=("ddim", "euler"), steps=(2, 3), seed=5).figure)
    for number, (sampler, steps) in enumerate([("ddim", 2), ("ddim", 3), ("euler", 2), ("euler", 3)]):
        (expected,) = pipe(PROMPT, sampler=sampler, num_inference_steps=steps, seed=5).images
        np.testing.assert_array_equal(view[number], np.asarray(expected))


# attention


def test_recorded_maps_are_the_softmax_and_change_nothing(folders, monkeypatch):
    """Every map is a distribution over tokens, of each head the mean; the output is that of torch's own attention."""
    unet, encoder = (part := load(folders["1"]).model).backbone, part.encoder
    conditions = stacked([encoder.encode(Prompt("a cat"))])
    x = torch.randn(1, 4, 10, 12, generator=torch.Generator().manual_seed(0))
    plain = unet.predict(x, 500, conditions)
    captured = []
    layer = dict(unet.cross_attentions())[unet.cross_attentions()[0][0]]
    layer.to_q.register_forward_hook(lambda *given: captured.append(given[2]))
    maps = []
    monkeypatch.setattr(AttentionMaps, "add", lambda _, scores: maps.append(scores))
    with recorded_attention(unet):
        recorded = unet.predict(x, 500, conditions)
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-5)
    assert len(maps) == len(unet.cross_attentions())
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones(len(each)))
    query = captured[0].unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    key = layer.to_k(conditions["tokens"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    expected = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1).mean(1)
    torch.testing.assert_close(maps[0], expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(unet.predict(x, 500, conditions), plain)


def test_maps_of_several_levels_are_averaged():
    """Latents of 5 x 3: two layers of 5 x 3 and one of 3 x 2."""
    fine, coarse, maps = torch.zeros(15, 2), torch.ones(6, 2), AttentionMaps()
    fine[0, 0] = 1
    for scores in (fine, coarse, fine):
        maps.add(scores)
    expected = torch.full((2, 5, 3), 1 / 3)
    expected[0, 0, 0] = 1
    torch.testing.assert_close(maps.mean(5, 3), expected)


def test_words_have_the_places_of_their_tokens(pipe):
    encoder = pipe.model.encoder
    assert words_and_places(encoder, "a (red:1.2) triceratops") == [
        ("a", [1]),
        ("red", [2]),
        ("triceratops", [3, 4, 5, 6]),
    ]
    assert words_and_places(encoder, "ring BREAK star") == [("ring", [1]), ("star", [encoder.length + 1])]


def test_attention_finds_the_objects():
    """The default model looks at the circle where the circle is, above, and at the square where it is, below."""
    default = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
    sheet = show.attention(default, PROMPT, seed=1)
    titles = [axes.get_title() for axes in sheet.figure.axes]
    assert titles == ["picture", *PROMPT.split()]
    heats = {axes.get_title(): axes.get_images()[1].get_array() for axes in sheet.figure.axes[1:]}
    rows = np.arange(16)[:, None] + 0.5
    centres = {word: float((heat * rows).sum() / heat.sum()) for word, heat in heats.items()}
    assert centres["circle"] < 7 < 9 < centres["square"]


def test_a_compiled_model_changes_to_torch(compiled_model):
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="auto", device="cpu")
    with pytest.warns(UserWarning, match="attention maps requires torch"):
        show.attention(pipe, "ring", seed=1, num_inference_steps=1)
    assert pipe.runtime == "torch"


# files


def test_files(pipe, picture, tmp_path):
    sheet = show.latents(pipe, picture)
    for name in ("a.png", "a.svg", "in/a new folder/a.html"):
        assert sheet.save(tmp_path / name) == tmp_path / name
    assert Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).size > (300, 200)
    assert Image.open(io.BytesIO(sheet._repr_png_())).format == "PNG"
    page = (tmp_path / "in/a new folder/a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "12,288 values became 4,096: 3.0 times fewer" in page
    assert 'src="http' not in page
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(ConfigError, match=r"file exists"):
        sheet.save(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (("schedule",), "outputs/schedule-00001.png"),
        (("reverse", PROMPT, "--set", "num_inference_steps=2", "-o", "r.html"), "r.html"),
        (("samplers", PROMPT, "--names", "ddim, unipc", "--steps", "1,2", "-o", "here"), "here/samplers-00008.png"),
    ],
)
def test_on_the_command_line(call, tmp_path, words, made):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/samplers-00007.png").touch()
    code, out, err = call("show", *words)
    assert (code, out) == (0, made + "\n"), err
    assert (tmp_path / made).stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("reverse", PROMPT, "-o", "x.gif"), 2, "a sheet is written as .png, .svg, .html (x.gif)"),
        (("reverse", PROMPT, "-o", "there.png"), 2, "file exists (there.png)"),
        (("reverse", PROMPT, "--set", "sampler=magic"), 2, "unknown sampler 'magic'"),
        (("reverse", PROMPT, "--set", "num_images=2"), 2, "num_images has no effect: a sheet has its own pictures"),
        (("reverse", PROMPT, "--columns", 1), 2, "columns must be from 2 to 16 (got 1)"),
        (("reverse", PROMPT, "--set", "hires_scale=2.0"), 2, "a strip has pictures of one size"),
        (("samplers", PROMPT, "--steps", "1,x"), 2, "--steps must be whole numbers"),
        (("samplers", PROMPT, "--steps", ",".join(["1"] * 99)), 2, "they must make 1 to 100 pictures"),
        (("attention", ""), 2, "attention maps require a prompt of 1 to 32 words (got 0)"),
        (("latents", "none.png"), 3, "none.png: no such file"),
        (("schedule", "-m", "nowhere"), 4, "no such model folder (nowhere)"),
        (("schedule", "--steps", 0), 2, "steps must be from 1 to 1000 (got 0)"),
    ],
)
def test_refused(call, tmp_path, words, code, message):
    (tmp_path / "there.png").write_bytes(b"")
    ended, out, err = call("show", *words)
    assert (ended, out, err.count("\n")) == (code, "", 1)
    assert message in err
