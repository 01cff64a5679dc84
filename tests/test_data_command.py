"""`latentdiff data` and training on one's own pictures, by the command line itself."""

import base64
import html
import io
import json
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from PIL import Image

from latentdiff.data.dataset import open_data
from latentdiff.settings.config import load_config

from . import forked
from .forked import Started
from .pictures import as_jsonl, as_parquet, broken_pictures, encoded, some_pictures


def ran(*words):
    """Exit code, stdout, and the lines of stderr without progress bars."""
    started = Started("data", *words)
    code, err = started.ended()
    lines = [line for line in re.split(r"[\r\n]+", err) if line and "%|" not in line and "image/s" not in line]
    return code, started.printed(), lines


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """40 sound pictures."""
    return as_jsonl(tmp_path_factory.mktemp("sound") / "set", some_pictures(40))


@pytest.fixture
def broken(tmp_path):
    """37 sound ones and three that cannot be read."""
    return as_jsonl(tmp_path / "broken", some_pictures(37) | broken_pictures())


REFUSED = (
    'error: 3 of 40 images cannot be read: a.jpg (truncated), b.png (empty), c.jpg (not an image: starts with "<html>")'
)


def test_check_refuses_and_lists(broken, tmp_path):
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    code, out, err = ran("check", broken)
    assert (code, err) == (3, [f"{REFUSED}. Mend them or pass --skip-bad"])
    assert re.search(r"images +40 = 37 that can be used \+ 3 that cannot", out)
    assert all(line in out for line in ("a.jpg (truncated)", "b.png (empty)", "c.jpg (not an image"))
    quarantine = tmp_path / "quarantine.jsonl"
    code, out, err = ran("check", broken, "--skip-bad", "--quarantine", quarantine)
    assert (code, err) == (0, [f"3 images left out: {quarantine}"])
    assert [json.loads(line)["name"] for line in quarantine.read_text().splitlines()] == ["a.jpg", "b.png", "c.jpg"]
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before


def test_the_report(tmp_path):
    """Counts against what was put there."""
    made = some_pictures(6)
    (data, _), (wide, _) = made["000.png"], (encoded(Image.new("RGB", (600, 200), "red")), "")
    frames = [Image.new("RGB", (80, 80), color) for color in ("red", "blue")]
    made |= {
        "again.png": (data, "the same"),
        "wide.png": (wide, "word " * 100),
        "moving.gif": (encoded(frames[0], "gif", save_all=True, append_images=frames[1:]), "moves <b>"),
        "clear.png": (encoded(Image.new("RGBA", (90, 90))), "clear"),
    }
    folder = as_jsonl(tmp_path / "set", made)
    (folder / "notes.md").write_text("x")
    words = ("check", folder, "--resolution", 32, "--bucket-step", 8, "--json", "--html", tmp_path / "page.html")
    code, out, _ = ran(*words)
    report = json.loads(out)
    assert code == 0
    assert report["images"]["text"] == "10 = 10 that can be used + 0 that cannot"
    assert report["duplicates"] == {"text": "2 images in 1 group of the same bytes", "lines": ["000.png, again.png"]}
    assert report["summary"] == {
        "source": str(folder),
        "layout": "metadata",
        "images": 10,
        "usable": 10,
        "samples": 10,
        "captions": 10,
        "duplicates": 2,
        "unusable": [],
        "captions_without_an_image": [],
        "refused": None,
    }
    assert report["captions"]["lines"] == ["wide.png: 102 tokens"]
    assert "1 images with a caption cut at 32 tokens" in report["captions"]["text"]
    assert report["colour modes"]["text"] == "RGB 8, RGBA 1, P 1"
    assert report["formats"]["text"] == "PNG 5, JPEG 2, WEBP 2, GIF 1"
    assert report["animations"]["lines"] == ["moving.gif"]
    assert report["data set"]["lines"] == ["1 other files are not read: notes.md"]
    table = [line.split() for line in report["buckets"]["lines"]]
    assert sum(int(row[1]) for row in table) == 10
    (row,) = [row for row in table if row[0] == "40x24"]
    assert row[1] == "4", "3 to 1, and three pictures of some_pictures"
    assert 11.1 < float(row[3].rstrip("%")) < 44.4, "a mean of four; 3 to 1 shown as 5 to 3 loses 44.4%"
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 10
    assert "moves &lt;b&gt;" in page
    assert "moves <b>" not in page


def test_the_preview_is_what_the_network_sees(sound, tmp_path):
    """Pictures to the bit, as the sample of that epoch is cropped and mirrored; captions after all their rules."""
    changes = ["data.pictures.flip=true", "data.pictures.crop=content", 'data.pictures.captions.prefix="sks "']
    words = [word for change in changes for word in ("--set", change)]
    code, out, _ = ran("preview", sound, "-o", tmp_path / "page.html", "-n", 10, "--epoch", 3, *words)
    assert (code, out.strip()) == (0, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    source = [("data.kind", "pictures"), ("data.pictures.source", str(sound))]
    examples = open_data(load_config(None, [*source, *changes])).training
    result = re.findall(r'base64,([^"]+)".*?<b>caption</b> (.*?)</div><div><b>read</b> (.*?)</div>', page)
    assert len(result) == 10
    for number, (data, caption, read) in enumerate(result):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert np.array_equal(np.asarray(image), examples.image(4 * number, 3))
        assert html.unescape(caption) == examples.caption(4 * number, 3)
        assert html.unescape(read).replace(" ", "") == html.unescape(caption).replace(" ", "").lower()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("check", "nowhere"), 3, "error: no such data set (nowhere)"),
        (("check", "configs/scenes-tiny.toml"), 2, "error: the data of configs/scenes-tiny.toml are procedural scenes"),
        (("check", "{sound}", "--resolution", "4"), 2, "error: Invalid value for '--resolution'"),
        (("check", "{sound}", "--html", "/nowhere/page.html"), 2, "error: cannot write to /nowhere/page.html"),
        (("check", "{sound}", "--skip-bad", "--quarantine", "{sound}"), 2, "error: cannot write to"),
        (("preview", "{sound}", "-o", "{sound}/000.png"), 2, "error: {sound}/000.png is a file of yours"),
        (("preview", "{sound}", "--epoch", "99999999999999999999"), 2, "error: Invalid value for '--epoch'"),
        (("check", "{sound}", "--bucket-step", "33"), 2, "error: no bucket of step 33 fits"),
        (("check", "{sound}", "--set", "data.pictures.validation_pictures=40"), 3, "error: 40 of 40 images are held"),
        (("preview", "{sound}", "--set", "data.pictures.crop=left"), 2, 'error: config: key "data.pictures.crop"'),
        (
            ("preview", "{sound}", "--set", "data.pictures.background=white"),
            2,
            'error: config: key "data.pictures.back',
        ),
        (("cache", "configs/scenes-tiny.toml", "--shard", "2/2"), 2, "error: --shard must be i/n"),
        (("cache", "configs/scenes-tiny.toml", "-o", "{sound}"), 2, "error: the denoiser requires the autoencoder"),
    ],
)
def test_wrong_arguments(words, code, message, sound, monkeypatch):
    monkeypatch.chdir(forked.ROOT)
    words = [word.format(sound=sound) for word in words]
    result, _, err = ran(*words)
    assert result == code
    assert len(err) == 1
    assert err[0].startswith(message.format(sound=sound)), err


# --- training on pictures ------------------------------------------------------------------------------

BUCKETS = ("data.pictures.bucket_step=8", "data.pictures.flip=true", "denoiser.training.train_batch_size=4")


def train(folder, source, *words, changes=(), hook=None):
    """`latentdiff train` of the tiny config on pictures; exit code and stderr."""
    return forked.train(folder, "--data", source, *words, changes=[*BUCKETS, *changes], hook=hook).ended()


@pytest.fixture(scope="module")
def trained(sound, tmp_path_factory):
    """All three stages on 40 pictures in several buckets, not disturbed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    code, err = train(run, sound)
    assert code == 0, err
    return run, err


@pytest.fixture
def begun(trained, tmp_path):
    """Another run whose denoiser is to be trained."""
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "clip", run / "clip", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(trained[0] / "model" / "vae", run / "model" / "vae")
    return run


@pytest.mark.slow
def test_training_tells_what_it_found(trained):
    _, err = trained
    assert re.search(r"data: 40 images \(metadata, .*\), 40 samples an epoch\n", err)
    assert re.search(r" +in 3 buckets, 40x24: \d+, 32x32: \d+, 24x40: \d+; \d+\.\d% cropped away\n", err)
    lines = [json.loads(line) for line in (trained[0] / "denoiser" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 14))
    assert any("validation_loss" in line for line in lines)


@pytest.mark.slow
def test_killed_in_buckets_goes_on_to_the_bit(trained, begun, sound):
    """In the middle of an accumulated step."""
    assert train(begun, sound, "--stage", "denoiser", hook=partial(forked.in_loss, "denoiser", 2 * 7))[0] == -9
    assert train(begun, sound, "--stage", "denoiser", "--resume", "latest")[0] == 0
    forked.assert_bitwise(trained[0], begun, ["denoiser"])


@pytest.mark.slow
def test_without_a_cache_the_same_is_learnt(trained, begun, sound):
    """To the bit, in buckets, mirrored, with workers."""
    changes = ["denoiser.cache=false", "denoiser.training.num_workers=2"]
    code, err = train(begun, sound, "--stage", "denoiser", changes=changes)
    assert code == 0, err
    assert "huggingface/tokenizers" not in err  # which warns of forks after its use
    assert not list((begun / "cache").glob("*/*.safetensors"))
    forked.assert_bitwise(trained[0], begun, ["denoiser"])


@pytest.mark.slow
def test_cached_ahead_by_jobs_and_streamed(trained, begun, sound, tmp_path):
    """Two jobs on another layout of the same pictures, read as a stream; then training encodes nothing itself."""
    table = as_parquet(tmp_path / "table", some_pictures(40))
    changes = [*forked.SHORT, *BUCKETS, "data.pictures.streaming=true"]
    words = [word for change in changes for word in ("--set", change)]
    config = forked.ROOT / "configs" / "scenes-tiny.toml"
    counts = []
    for number in range(2):
        code, _, err = ran("cache", config, "-o", begun, "--shard", f"{number}/2", "--data", table, *words)
        assert code == 0, err
        counts.append([int(word) for word in re.findall(r"\d+", err[-1])])
    assert np.sum(counts, 0).tolist() == [2 * 40, 40 + 1]  # each picture also mirrored; the empty caption
    before = sorted((begun / "cache").rglob("*.safetensors"))
    code, err = train(begun, table, "--stage", "denoiser", changes=["data.pictures.streaming=true"])
    assert code == 0, err
    assert sorted((begun / "cache").rglob("*.safetensors")) == before
    forked.assert_bitwise(trained[0], begun, ["denoiser"])


def test_a_later_stage_is_thought_of_before_the_first(sound, tmp_path):
    """Hours of training would be wasted else."""
    code, err = train(tmp_path / "run", sound, changes=["clip.training.train_batch_size=64"])
    assert code == 2
    assert err.splitlines()[-1].startswith("error: clip.training.train_batch_size: 64 a step is more than 40 images")
    table = as_parquet(tmp_path / "table", some_pictures(40))
    code, err = train(tmp_path / "run", table, "--dry-run", changes=["data.pictures.streaming=true"])
    assert code == 2
    assert err.splitlines()[-1].endswith("Train the denoiser alone: --stage denoiser")
    assert not (tmp_path / "run" / "model").exists()


def test_streams_are_shown_too(sound, tmp_path):
    table = as_parquet(tmp_path / "table", some_pictures(40))
    pages = []
    for source, more in ((sound, ()), (table, ("--set", "data.pictures.streaming=true"))):
        assert ran("preview", source, "-o", tmp_path / "page.html", "-n", 5, *more)[0] == 0
        page = (tmp_path / "page.html").read_text()
        pages.append(re.findall(r'base64,([^"]+)".*?<b>caption</b> (.*?)</div>', page))
    assert len(pages[0]) == 5
    assert pages[0] == pages[1]


def test_a_goes_on_models_are_the_same(trained, begun, sound):
    """All of the folder that `generate` and diffusers load, the tokenizer too, though CLIP was not trained here."""
    assert train(begun, sound, "--stage", "denoiser")[0] == 0
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (trained[0] / "model" / part).iterdir():
            own, other = (path.read_bytes() for path in (file, begun / "model" / part / file.name))
            if file.name == "config.json":  # diffusers writes where a network was loaded from
                own, other = (re.sub(rb'"_name_or_path": ".*"', b"", text) for text in (own, other))
            assert own == other, file


def test_training_refuses_what_check_refuses(broken, tmp_path):
    code, err = train(tmp_path / "run", broken)
    assert code == 3
    assert err.splitlines()[-1] == f"{REFUSED}. Mend them or pass --skip-bad"
    assert not (tmp_path / "run" / "autoencoder").exists()
    assert train(tmp_path / "run", broken, "--skip-bad", "--dry-run")[0] == 0


def test_skipping_bad_ones_is_written_down(broken, tmp_path):
    code, err = train(tmp_path / "run", broken, "--skip-bad", "--stage", "autoencoder")
    assert code == 0, err
    assert "3 left out (quarantine.jsonl)" in err
    rows = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(row)["name"] for row in rows] == ["a.jpg", "b.png", "c.jpg"]


def test_a_changed_set_is_refused(trained, sound, tmp_path):
    """A caption edited is another set; a set that was moved is not."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    moved = shutil.copytree(sound, tmp_path / "moved")
    assert train(run, moved)[0] == 0
    (moved / "metadata.jsonl").write_text((moved / "metadata.jsonl").read_text().replace("picture 7,", "picture 77,"))
    code, err = train(run, moved)
    assert code == 2
    assert "cannot resume: dataset changed (40 images, others than before)" in err.splitlines()[-1]


def test_a_bad_sample_is_named(begun, sound):
    """What the user calls it."""
    code, err = train(begun, sound, "--stage", "denoiser", hook=forked.not_finite_losses)
    assert code == 5
    assert re.search(r"error: loss is not finite at step 1 \(samples (\d+\.\w+, )*\d+\.\w+[,)]", err.splitlines()[-1])


def test_signals_while_encoding(begun, sound):
    """What was encoded stays; the same command resumes."""
    act = partial(forked.send, signal.SIGTERM)
    code, err = train(begun, sound, "--stage", "denoiser", hook=partial(forked.in_caching, act))
    assert code == 143
    assert err.splitlines()[-1] == "error: stopped by SIGTERM. Run the same command to resume"
