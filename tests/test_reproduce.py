"""Pictures made again from what they say of themselves, and records that are not to be believed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.cli import main
from latentdiff.core.errors import ConfigError, DataError, ModelError
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.drawing.files import encoded
from latentdiff.drawing.record import read_metadata
from latentdiff.drawing.reproduce import Likeness, reproduce
from latentdiff.families.loading import DEFAULT_MODEL


def again(path, *words):
    """The picture in the file, drawn again."""
    return reproduce(path, LatentDiffusionPipeline.from_pretrained, *words)


PROMPT = "a red circle above a blue square"
QUICK = {"num_inference_steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with a model, pictures and an adapter, as a user would have it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "models").mkdir()
    shutil.copytree(tiny_model, folder / "models" / "tiny")
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / "photo.png")
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    networks = adaptable_networks(LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu").model)
    name = next(n for n, _ in networks["unet"].named_modules() if n.endswith("attn2.to_q"))
    wide = networks["unet"].get_submodule(name).weight.shape
    seeded = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, wide[1], generator=seeded), torch.randn(wide[0], 2, generator=seeded)
    state = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(state, folder / "ink.safetensors")
    save_file({"<ink>": torch.randn(2, 32, generator=seeded)}, folder / "word.safetensors")
    return folder


COMMANDS = {  # how a picture is asked for, on the command line
    "text": [],
    "batch": ["-N", 3],
    "batches": ["-N", 3, "--batch-size", 2],
    "negative": ["-n", "green", "--cfg", 5],
    "sampler": ["--sampler", "dpmpp_2m_sde", "--spacing", "karras"],
    "eta": ["--eta", 0.5],
    "size": ["--size", "96x64"],
    "image": ["-i", "photo.png", "--strength", 0.7],
    "mask": ["-i", "photo.png", "--mask", "mask.png"],
    "outpaint": ["-i", "photo.png", "--outpaint", "8,0,3,16"],
    "lora": ["--lora", "ink.safetensors:0.5"],
    "words": ["--embedding", "word.safetensors"],
    "hires": ["--hires-scale", 1.5],
    "variation": ["--set", "variation_seed=7", "--set", "variation_strength=0.3", "-N", 2],
    "clip": ["--clip-guidance-scale", 3],
    "apg": ["--set", "apg=true", "--set", "apg_norm=3.0", "--cfg", 5],
    "pag": ["--set", "pag_scale=2"],
    "interval": ["--set", "guidance_interval=[-3, 3]", "--guidance-rescale", 0.5],
    "weaker": ["--weaker", "models/tiny", "--set", "autoguidance_scale=2"],
    "long": [],
    "bfloat16": ["--dtype", "bfloat16"],
}


@pytest.fixture(scope="module")
def pictures(place, tiny_model):
    """One picture or more of each kind, from the command line in one process."""
    import os
    import sys
    from pathlib import Path
    from unittest import mock

    here = Path.cwd()
    os.chdir(place)
    try:
        for name, words in COMMANDS.items():
            prompt = "a (red:1.3) <ink> circle " + "and more " * (20 if name == "long" else 1)
            options = ["generate", prompt, "-m", "models/tiny", "--steps", 3, "-s", 1, "-o", f"out/{name}", *words]
            with mock.patch.object(sys, "argv", ["latentdiff", *map(str, options)]), pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, name
    finally:
        os.chdir(here)
    return {path.relative_to(place / "out"): path for path in sorted((place / "out").rglob("*.png"))}


@pytest.mark.slow
def test_every_kind_of_picture_is_made_again(pictures, place, monkeypatch):
    """To the bit, in the folder where they were made."""
    monkeypatch.chdir(place)
    likes = {name: again(path)[1] for name, path in pictures.items()}
    print(f"{sum(like.equal for like in likes.values())} of {len(likes)} reproduced bitwise equal")
    assert len(likes) == len(COMMANDS) + 5
    assert {name: str(like) for name, like in likes.items() if not like.equal} == {}


@pytest.mark.slow
def test_a_variation_is_drawn_by_what_its_text_says(pictures, place, call, tiny_model):
    """The second of two variations, alone, with the seeds in A1111's text."""
    path = place / "out" / "variation" / "00002-2.png"
    line = read_metadata(path)["parameters"].splitlines()[-1]
    fields = dict(field.split(": ", 1) for field in line.split(", ") if ": " in field)
    words = ("-s", fields["Seed"], "--set", f"variation_seed={fields['Variation seed']}")
    words += ("--set", "variation_strength=0.3", "--steps", 3, "-m", tiny_model, "-o", "alone.png")
    assert (fields["Seed"], fields["Variation seed"]) == ("1", "8")
    assert call("generate", "a (red:1.3) <ink> circle and more ", *words)[0] == 0
    difference = np.abs(np.asarray(Image.open("alone.png")).astype(int) - np.asarray(Image.open(path)))
    assert difference.max() <= 1, "in a batch of one: rounding"


def test_no_place_of_its_maker_is_told(pictures, place):
    for path in pictures.values():
        assert str(place).encode() not in path.read_bytes()


def test_from_elsewhere(pictures, place, tmp_path, monkeypatch):
    """What is not beside the picture is named by the user; what has another content is not taken."""
    monkeypatch.chdir(tmp_path)
    (picture,) = (path for name, path in pictures.items() if name.parts[0] == "mask")
    alone = shutil.copy(picture, tmp_path / "alone.png")
    with pytest.raises(ConfigError, match=r"its model scenes-tiny is not at 'models/tiny' here"):
        again(alone)
    model = place / "models" / "tiny"
    with pytest.raises(ConfigError, match=r"photo.png is not here"):
        again(alone, model)
    assert again(alone, model, [place])[1].equal
    assert again(alone, model, [place / "photo.png", place / "mask.png"])[1].equal
    (tmp_path / "other").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "other" / "photo.png")
    with pytest.raises(DataError, match=r"photo.png or its mask is another picture now"):
        again(alone, model, [tmp_path / "other", place])


def test_another_model_or_adapter(pictures, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (picture,) = (path for name, path in pictures.items() if name.parts[0] == "lora")
    with pytest.raises(ModelError, match=f"another model: {DEFAULT_MODEL}"):
        again(picture, LatentDiffusionPipeline.from_pretrained(device="cpu").card.folder)
    (tmp_path / "other").mkdir()
    wide = json.loads((place / "models/tiny/unet/config.json").read_text())["block_out_channels"][0]
    state = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(wide, 1, 1, 1),
    }
    save_file(state, tmp_path / "other" / "ink.safetensors")
    with pytest.raises(ModelError, match=r"ink.safetensors is another file now"):
        again(picture, None, [tmp_path / "other"])


def test_likeness_is_told():
    assert str(Likeness(0, 12288, 0, float("inf"), {})) == "equal: all 12,288 values"
    versions = {"torch": ("2.14.0", "2.15.0"), "numpy": ("2", "2")}
    assert str(Likeness(34, 12288, 2, 58.21, versions)) == (
        "not equal: 34 of 12,288 values differ, by at most 2 of 255 (PSNR 58.2 dB); "
        "drawn with other versions: torch 2.14.0 -> 2.15.0"
    )


def test_a_picture_that_was_changed(pictures, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (picture,) = (path for name, path in pictures.items() if name.parts[0] == "text")
    with Image.open(picture) as image:
        pixels, record = np.array(image), image.info["latentdiff"]
    pixels[5, 7, 1] ^= 8
    info = PngInfo()
    info.add_itxt("latentdiff", record)
    Image.fromarray(pixels).save(tmp_path / "changed.png", pnginfo=info)
    like = again(tmp_path / "changed.png", "models/tiny")[1]
    assert (like.differing, like.largest) == (1, 8)
    for path, code in ((tmp_path / "changed.png", 1), (picture, 0)):
        monkeypatch.setattr("sys.argv", ["latentdiff", "reproduce", str(path), "-m", "models/tiny"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    assert like.psnr == pytest.approx(10 * np.log10(255**2 * pixels.size / 64))


def from_picture(name, below=0):
    return {"image": name, "mask": None, "outpaint": [0, 0, 0, below], "sha256": "0" * 64}


def forged(path, place, **changes):
    """A picture with a record that was tampered with."""
    tree = read_metadata(next((place / "out" / "text").glob("*.png")))["latentdiff"]
    for key, value in changes.items():
        target, names = tree, key.split("__")
        for name in names[:-1]:
            target = target[name]
        target[names[-1]] = value
    info = PngInfo()
    info.add_itxt("latentdiff", json.dumps(tree))
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"request__width": 10**9}, ConfigError, "width must be a multiple"),
        ({"request__num_inference_steps": 10**6}, DataError, "num_inference_steps"),
        ({"request__num_images": 10**9}, DataError, "num_images"),
        ({"request__prompt": "x" * 10**6}, DataError, "prompt"),
        ({"request__prompt": "a (red:99)"}, ConfigError, "from -10 to 10"),
        ({"request__eval": "1"}, DataError, "eval"),
        ({"request__guidance_scale": "7"}, DataError, "guidance_scale"),
        ({"seed": 5}, DataError, "contradicts itself"),
        ({"index": -1}, DataError, "index"),
        ({"batch": [0, 10**9]}, DataError, "batch"),
        ({"batch": [3, 2]}, DataError, "contradicts itself"),
        ({"batch": [0, 1024]}, DataError, "contradicts itself"),
        ({"dtype": "__class__"}, DataError, "dtype"),
        ({"runtime": "shell"}, DataError, "runtime"),
        ({"model_source": "/etc"}, ConfigError, "is not at '/etc' here"),
        ({"model_source": "../models/tiny"}, ConfigError, "is not at"),
        ({"model_source": "owner/name@main"}, ConfigError, "Allow it with --model owner/name"),
        ({"model_hash": "x"}, DataError, "model_hash"),
        ({"own_noise": True}, ConfigError, "a caller's own noise or embeddings"),
        ({"more": 1}, DataError, "more"),
        ({"sources": [{"kind": "lora", "path": "/etc/passwd", "sha256": "0" * 64}]}, ConfigError, "not searched for"),
        ({"sources": [{"kind": "lora", "path": "../x", "sha256": "0" * 64}]}, ConfigError, "not searched for"),
        ({"sources": [{"kind": "lora", "path": "x", "sha256": "0"}]}, DataError, "sha256"),
        ({"sources": [{"kind": "run", "path": "x", "sha256": "0" * 64}]}, DataError, "kind"),
        ({"sources": [{"kind": "lora", "path": "x", "sha256": "0" * 64, "weight": 1e9}]}, DataError, "weight"),
        (
            {"canvas": {"image": "/etc/passwd", "mask": None, "outpaint": [0, 0, 0, 0], "sha256": "0" * 64}},
            ConfigError,
            "not searched for",
        ),
        (
            {"canvas": {"image": "photo.png", "mask": None, "outpaint": [0, 0, 0, -1], "sha256": "0" * 64}},
            DataError,
            "outpaint",
        ),
        (
            {"canvas": {"image": "photo.png", "mask": None, "outpaint": [0, 0, 0, 0], "sha256": "0" * 64}},
            DataError,
            "is another picture now",
        ),
    ],
    ids=str,
)
def test_records_from_outside(pictures, place, tmp_path, monkeypatch, changes, kind, message):
    monkeypatch.chdir(place)
    with pytest.raises(kind, match=message) as caught:
        again(forged(tmp_path / "forged.png", place, **changes))
    assert len(str(caught.value)) < 400


def test_a_pipe_is_not_waited_for(pictures, place, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(place)
    os.mkfifo(tmp_path / "ours.png")
    with pytest.raises(ConfigError, match=r"ours.png is not here"):
        again(forged(tmp_path / "forged.png", place, canvas=from_picture("ours.png")))


def test_other_decoders_are_not_asked(tmp_path):
    """EPS is drawn by a program of the system: no picture of ours is one."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(DataError, match="not a readable picture"):
        again(tmp_path / "a.png")


def test_pictures_that_say_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no record of latentdiff"):
        again(tmp_path / "a.png")


def test_other_formats(place, monkeypatch, tmp_path):
    """WebP without loss is equal; a JPEG is compared with what JPEG makes of the picture drawn again."""
    monkeypatch.chdir(place)
    pipe = LatentDiffusionPipeline.from_pretrained("models/tiny", device="cpu")
    pipe.load_lora_weights(place / "ink.safetensors", fuse=True)
    out = pipe(PROMPT, **QUICK)
    for suffix in (".webp", ".jpg"):
        (tmp_path / f"a{suffix}").write_bytes(encoded(out.images[0], suffix, out.metadata[0]))
        assert read_metadata(tmp_path / f"a{suffix}")["latentdiff"]["seed"] == 1
        like = again(tmp_path / f"a{suffix}")[1]
        assert str(like) == "equal: all 12,288 values" + (", both as JPEGs" if suffix == ".jpg" else "")
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "b.jpg", quality=50, exif=image.getexif())
    like = again(tmp_path / "b.jpg")[1]
    assert (like.equal, like.jpeg, like.psnr > 25) == (False, True, True)


def test_records_of_version_1(compiled_model, tmp_path):
    """What they call heun and uniform has another name since, and is drawn as it was; a later version is refused."""
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino")
    (path,) = pipe(PROMPT, sampler="heun_exponential", spacing="exponential", **QUICK).save(tmp_path)
    tree = read_metadata(path)["latentdiff"]
    assert tree["version"] == 2

    def written(name, record):
        info = PngInfo()
        info.add_itxt("latentdiff", json.dumps(record))
        Image.open(path).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    request = {name: value for name, value in tree["request"].items() if name != "churn"}
    old = {name: value for name, value in tree.items() if name != "version"}
    old["request"] = request | {"sampler": "heun", "spacing": "uniform"}
    assert again(written("old.png", old), compiled_model)[1].equal
    assert again(written("one.png", old | {"version": 1}), compiled_model)[1].equal
    with pytest.raises(DataError, match="version"):
        again(written("later.png", tree | {"version": 3}))
