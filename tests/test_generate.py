"""`latentdiff generate` in all its ways, in this process: files, streams, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.cli.loading import adapter_and_weight
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.presets import settled
from latentdiff.drawing.reproduce import read_record
from latentdiff.drawing.request import request
from latentdiff.families.loading import DEFAULT_MODEL

PROMPT = "a red circle above a blue square"


@pytest.fixture
def generate(call, tiny_model):
    """Two steps of the tiny model: exit code, stdout and stderr."""
    return lambda *words: call("generate", *words, "-m", tiny_model, "--steps", 2)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((64, 72), np.uint8)
    mask[10:30, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return pixels


def test_a_file_of_prompts(generate, tmp_path):
    """A picture a line; seeds go on counting; each as if it were asked for alone."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  two blue rings  \r\nthree green stars\n")
    code, out, err = generate("--prompts-file", "prompts.txt", "-s", 7, "-N", 2, "--batch-size", 2)
    assert (code, err) == (0, "")
    paths = out.split()
    assert paths == [f"outputs/{i + 1:05d}-{7 + i}.png" for i in range(6)]
    records = [read_record(tmp_path / path) for path in paths]
    prompts = ["a red circle", "two blue rings", "three green stars"]
    assert [record.request.prompt for record in records] == [prompt for prompt in prompts for _ in range(2)]
    assert generate("two blue rings", "-s", 9, "-N", 2, "--batch-size", 2, "-o", "alone")[0] == 0
    for path, other in zip(paths[2:4], sorted((tmp_path / "alone").iterdir()), strict=True):
        with Image.open(tmp_path / path) as together, Image.open(other) as alone:
            assert np.abs(np.asarray(together).astype(int) - np.asarray(alone)).max() <= 1


def test_a_file_of_objects(generate, photo, tmp_path):
    """Every line has settings and pictures of its own; paths are relative to the file."""
    (tmp_path / "in").mkdir()
    for name in ("photo.png", "mask.png"):
        (tmp_path / name).rename(tmp_path / "in" / name)
    lines = [
        {"prompt": "a red circle", "seed": 3, "guidance_scale": 2.5},
        {"prompt": "two blue rings", "width": 96, "negative_prompt": "red", "guidance_interval": [-1, 1]},
        {"prompt": "a star", "image": "photo.png", "mask_image": "mask.png", "strength": 1.0},
        {"prompt": "a star", "image": "photo.png", "outpaint": [8, 0, 0, 0]},
    ]
    (tmp_path / "in" / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = generate("--prompts-file", "in/jobs.jsonl", "--json", "--cfg", 4)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [one["seed"] for one in rows] == [3, 4, 5, 6]
    assert [(one["width"], one["height"]) for one in rows] == [(64, 64), (96, 64), (72, 64), (80, 64)]
    records = [read_record(tmp_path / one["path"]) for one in rows]
    assert [record.request.guidance_scale for record in records] == [2.5, 4.0, 4.0, 4.0]
    with Image.open(tmp_path / rows[2]["path"]) as picture:
        marked = np.zeros((64, 72), bool)
        marked[10:30, 10:30] = True
        assert np.array_equal(np.asarray(picture)[~marked], photo[~marked])
    assert "in/photo.png: runs 2 of 2 steps" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\n \n", "the file has no prompts (x.txt)"),
        ("x.txt", b"caf\xe9", "prompts are not text in UTF-8, byte 3 (x.txt)"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', "x.jsonl line 2 is not JSON"),
        ("x.jsonl", b'{"prompt": "a", "seed": 1, "seed": 2}', "x.jsonl line 1: seed is given twice"),
        ("x.jsonl", b'["a"]', 'x.jsonl line 1 must be an object with a "prompt"'),
        (
            "x.jsonl",
            b'{"prompt": "a", "stepps": 3}',
            "x.jsonl line 1: unknown setting 'stepps' (did you mean num_inference_steps?)",
        ),
        ("x.jsonl", b'{"prompt": "a", "seed": true}', "x.jsonl line 1: seed"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "x.jsonl line 2: prompt is empty"),
        ("x.jsonl", b'{"prompt": "a", "image": 3}', "x.jsonl line 1: image and mask are paths"),
        (
            "x.jsonl",
            b'{"prompt": "a", "outpaint": 3}',
            "x.jsonl line 1: outpaint must be (left, top, right, bottom) pixels",
        ),
        ("x.jsonl", b'{"prompt": "a", "mask": "m.png"}', "m.png: no such file"),
        (
            "x.jsonl",
            b'{"prompt": "a", "outpaint": [true, 0, 0, 0]}',
            "x.jsonl line 1: outpaint must be",
        ),
        ("x.jsonl", b'{"prompt": "a", "image": "a\\u0000b"}', "embedded null byte"),
        ("y.txt", None, "cannot read prompts (y.txt): no such file or directory"),
    ],
    ids=str,
)
def test_files_of_prompts_that_are_refused(generate, tmp_path, name, content, message):
    """In one line that names the line, and nothing is drawn."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = generate("--prompts-file", name)
    assert (code in (2, 3), out, err.count("\n")) == (True, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "outputs").exists()


def test_pictures_on_the_command_line(generate, photo, tmp_path):
    code, _, err = generate(PROMPT, "-i", "photo.png", "--strength", 0.5, "-o", "a.webp", "-s", 1)
    assert (code, err) == (0, "photo.png: runs 1 of 2 steps\n")
    code, _, err = generate(PROMPT, "-i", "photo.png", "--mask", "mask.png", "-o", "b.png", "-s", 1)
    assert code == 0
    with Image.open(tmp_path / "b.png") as picture:
        assert np.array_equal(np.asarray(picture)[40:], photo[40:])
    assert read_record(tmp_path / "b.png").canvas.mask == "mask.png"
    code, _, _ = generate(PROMPT, "-N", 2, "--format", "jpg", "-s", 1)
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["00001-1.jpg", "00002-2.jpg"]
    assert read_record(tmp_path / "outputs" / "00002-2.jpg").seed == 2
    code, _, err = generate(PROMPT, "-i", "photo.png", "--mask", "mask.png", "-o", "b.jpg", "-s", 1)
    assert (code, err.splitlines()[0]) == (0, "warning: JPEG changes the pixels that a mask keeps; PNG and WebP do not")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-i", "none.png"), 3, "none.png: no such file or directory"),
        (("-i", "text.png"), 3, 'text.png: not an image: starts with "<html>"'),
        (("--strength", 0.5), 2, "strength requires an image"),
        (("--mask", "mask.png"), 2, "a mask and outpainting require an image"),
        (
            ("-i", "photo.png", "--mask", "photo2.png"),
            2,
            "mask_image must have the size of the image: 64x64, the image is 72x64",
        ),
        (("-i", "photo.png", "--strength", 0.1), 2, "strength 0.1 of 2 steps is less than one step"),
        (("-i", "photo.png", "--hires-scale", 2), 2, "hires_scale has no effect with an image"),
        (("--lora", "none.safetensors:0.5"), 4, "no adapter at none.safetensors"),
        (("--lora", "text.png"), 4, "text.png is not a safetensors file"),
        (("--embedding", "photo.png"), 4, "photo.png is not a safetensors file"),
        (("--lora", "text.png:99"), 2, "an adapter's weight must be from -10 to 10"),
        (("--embedding", "none.safetensors"), 4, "no embeddings at none.safetensors"),
        (("--lora", "text.png:strong"), 2, "--lora must be PATH:WEIGHT, and 'strong' is not a number"),
        (("--weaker", "none", "--set", "autoguidance_scale=2"), 4, "no such model folder (none)"),
        (("-i", "small.png"), 2, "small.png has 2x1 pixels, less than 2. Enlarge it (width, height)"),
        (("--set", "autoguidance_scale=2"), 2, "autoguidance_scale requires a weaker model"),
        (("--clip", "none", "--clip-guidance-scale", 3), 4, "no CLIP in open_clip's format at none"),
        (("--set", "original_size=[64, 64]"), 2, "original_size and crop require a model that reads sizes"),
        (("-i", "/dev/zero"), 3, "/dev/zero: is not a file"),
        (("--set", "prompt=x"), 2, "the prompt is an argument"),
        (("--set", "seed=" + "9" * 5000), 2, "is a number of too many digits"),
        (("--outpaint", "1000000000,0,0,0", "-i", "photo.png"), 2, "--outpaint must be LEFT"),
        (("--outpaint", "4096,0,0,0", "-i", "photo.png"), 2, "outpaint must be (left, top, right, bottom) pixels"),
        (("-i", "photo.png", "-W", 1_000_000), 2, "width must be a multiple of 2 from 2 to 2048"),
        (("--revision", "main"), 2, "revision applies to hub ids"),
        (("--variant", "fp16"), 4, "no weights of variant fp16"),
    ],
    ids=str,
)
def test_refused(generate, photo, tmp_path, words, code, message):
    (tmp_path / "text.png").write_text("<html>")
    Image.new("L", (64, 64), 255).save(tmp_path / "photo2.png")
    Image.new("L", (2, 1), 255).save(tmp_path / "small.png")
    result, out, err = generate(PROMPT, *words)
    assert (result, out, err.count("\n")) == (code, "", 1)
    assert message in err
    assert not (tmp_path / "outputs").exists()


def test_a_record_too_long_is_known_before_anything_is_drawn(generate, tmp_path):
    code, _, err = generate(PROMPT, "-o", "long.jpg", "-n", "\u00e9" * 10_000)
    assert (code, err.splitlines()[-1].startswith("error: its record is too long for this format")) == (3, True)
    assert not (tmp_path / "long.jpg").exists()


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a.b", "a.b", 1.0), ("a:0.8", "a", 0.8), ("C:/a.b", "C:/a.b", 1.0), ("C:/a:-1", "C:/a", -1.0)],
)
def test_adapters_and_their_weights(text, path, weight):
    result = adapter_and_weight(text)
    assert (str(result[0]), result[1]) == (path, weight)


def test_the_default_model_has_a_name(call, monkeypatch):
    """As model and as the weaker one, unless a folder of that name is there."""
    words = ("generate", "a red circle", "-s", "1", "--steps", "2")
    assert call(*words, "-o", "one.png")[0] == 0
    assert call(*words, "-m", DEFAULT_MODEL, "-o", "named.png")[0] == 0
    assert np.array_equal(*(np.asarray(Image.open(name)) for name in ("one.png", "named.png")))
    assert (
        call(*words, "--runtime", "torch", "--weaker", DEFAULT_MODEL, "--set", "autoguidance_scale=2", "-o", "w.png")[0]
        == 0
    )
    code, out, _ = call("info", DEFAULT_MODEL)
    assert (code, json.loads(out)["name"]) == (0, DEFAULT_MODEL)
    assert call("reproduce", "named.png", "-m", DEFAULT_MODEL)[0] == 0
    assert call("convert", DEFAULT_MODEL, "half", "--dtype", "float16")[0] == 0
    Path(DEFAULT_MODEL).mkdir()
    code, _, err = call(*words, "-m", DEFAULT_MODEL, "-o", "folder.png")
    assert (code, f"no model_index.json ({DEFAULT_MODEL})" in err) == (4, True), err


def test_a_folder_that_holds_something_else_than_a_model(call, tmp_path, tiny_model):
    """The folder of a run, of an adapter, of a learnt word: what to do instead."""
    for name, file in (("run", "model/model_index.json"), ("mine", "pytorch_lora_weights.safetensors")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).touch()
    (tmp_path / "word").mkdir()
    (tmp_path / "word" / "learned_embeds.safetensors").touch()
    advice = {"run": "Its model is run/model", "mine": "use --lora", "word": "use --embedding"}
    for name, words in advice.items():
        code, _, err = call("generate", PROMPT, "-m", name)
        assert (code, err.count("\n"), words in err) == (4, 1, True), err


def test_lone_brackets_are_characters(call):
    """Said once for all pictures; nothing is refused."""
    words = ("generate", "a red circle :)", "-N", "3", "--batch-size", "1", "--steps", "1", "-s", "1")
    code, out, err = call(*words)
    assert code == 0
    assert out.count("\n") == 3
    assert err == "warning: prompt: ) without a partner is read as a character\n"


def test_comments_in_a_file_of_prompts(call):
    Path("prompts.txt").write_text("# scenes\na red circle\n\n  # not a comment\n")
    code, out, _ = call("generate", "--prompts-file", "prompts.txt", "--steps", "1", "-s", "1", "--json")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a red circle", "# not a comment"]


def test_a_grid_as_json(call):
    """Every line is JSON; the last one names the grid."""
    code, out, err = call("generate", "a red circle", "--steps", "1", "-s", "1", "-N", "2", "--json", "--grid")
    assert code == 0, err
    *pictures, sheet = map(json.loads, out.splitlines())
    assert [one["seed"] for one in pictures] == [1, 2]
    with Image.open(sheet["grid"]) as picture:
        assert picture.width >= 2 * 64


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpm++ 2m sde exponential", "dpmpp_2m_sde", "exponential"),
        ("Euler a", "euler_ancestral", "trailing"),
        ("Euler", "euler", "trailing"),
        ("DPM++ 2M", "dpmpp_2m", "trailing"),
        ("UniPC SGM Uniform", "unipc", "sgm_uniform"),
    ],
)
def test_samplers_by_the_names_of_a1111(name, sampler, spacing):
    made = request(prompt="a", sampler=name)
    assert (made.sampler, made.spacing) == (sampler, spacing)


def test_a_name_of_a1111_beside_another_spacing():
    for spacing in ("karras", "Karras"):
        assert request(prompt="a", sampler="DPM++ 2M Karras", spacing=spacing).spacing == "karras"
    assert request(prompt="a", sampler="Euler SGM Uniform", spacing="SGM Uniform").spacing == "sgm_uniform"
    twice = request(prompt="a", sampler="Euler Align Your Steps", spacing="align_your_steps_xl")
    assert twice.spacing == "align_your_steps_xl", "two grids have this label"
    assert settled({"spacing": "leading"}, {"sampler": "DPM++ 2M Karras"})["spacing"] == "karras"
    with pytest.raises(ConfigError, match="'DPM\\+\\+ 2M Karras' has the spacing karras: leave out spacing"):
        request(prompt="a", sampler="DPM++ 2M Karras", spacing="exponential")
