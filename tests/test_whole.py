"""Folders that others may read appear whole, whatever kills their writer; what killed writers leave is removed."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from latentdiff.core import files
from latentdiff.core.errors import ModelError
from latentdiff.core.files import SCRATCH, atomic, scratch
from latentdiff.families.loading import included_model

from .stable_diffusion import load, stored

MARK = ".scratch-of-latentdiff"
CONTEXT = multiprocessing.get_context("fork")


def write(folder, value):
    """Two parts that belong together, one of them nested."""
    for name in ("a.txt", "unet/b.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value)


def read(folder):
    """What the folder holds: one value, or else two."""
    return {(folder / name).read_text() for name in ("a.txt", "unet/b.txt")}


def in_process(target, *arguments):
    """Run it in a process of its own; its exit code."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def replace(folder, value):
    with atomic(folder) as made:
        made.mkdir()
        write(made, value)


def replace_and_die(folder, name, number):
    """SIGKILL at the `number`-th call of a function of `os` or `shutil`."""
    owner = os if hasattr(os, name) else shutil
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    replace(folder, "new")


def test_the_new_folder_replaces_the_old_one(tmp_path):
    """Files at the top that only the old one has stay; parts are replaced as wholes; nothing else is left."""
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "extra").mkdir()
    (tmp_path / "model" / "extra" / "x").write_text("mine too")
    (tmp_path / "model" / "link").symlink_to("notes.txt")
    (tmp_path / "model" / "unet" / "stale.txt").write_text("of the old part")
    (tmp_path / "model").chmod(0o750)
    replace(tmp_path / "model", "new")
    assert read(tmp_path / "model") == {"new"}
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "extra" / "x").read_text() == "mine too"
    assert (tmp_path / "model" / "link").readlink().name == "notes.txt"
    assert not (tmp_path / "model" / "unet" / "stale.txt").exists()
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_changes_nothing(tmp_path):
    write(tmp_path / "model", "old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "model") as made:
        made.mkdir()
        write(made, "new")
        raise RuntimeError
    assert read(tmp_path / "model") == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "real" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "real" / "model")
    replace(tmp_path / "model", "new")
    assert (tmp_path / "model").is_symlink()
    assert read(tmp_path / "real" / "model") == {"new"}


def test_without_links_and_without_exchange(tmp_path, monkeypatch):
    """File systems without hard links, and systems without renameat2."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links here")))
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    replace(tmp_path / "model", "new")
    assert read(tmp_path / "model") == {"new"}
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_stays_if_it_cannot_be_exchanged(tmp_path, monkeypatch):
    """Without renameat2: the second of two renames fails."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: object())
    write(tmp_path / "model", "old")
    rename, calls = Path.rename, []

    def fails_once(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="no"):
        replace(tmp_path / "model", "new")
    assert read(tmp_path / "model") == {"old"}


def test_a_scratch_folder_that_another_process_removes(tmp_path, monkeypatch):
    """Both have seen it; the slower one goes on."""
    gone = tmp_path / f"{SCRATCH}x"
    files._remove_if_abandoned(gone)
    gone.mkdir()
    opened = []
    own = files.os.open
    monkeypatch.setattr(files.os, "open", lambda *options: opened.append(gone.rmdir()) or own(*options))
    files._remove_if_abandoned(gone)
    assert (len(opened), gone.exists()) == (1, False)


@pytest.mark.parametrize(("name", "number"), [("mkdir", 3), ("mkdir", 4), ("link", 1), ("link", 2), ("rmtree", 1)])
def test_killed_anywhere_it_is_the_old_or_the_new_one(name, number, tmp_path):
    write(tmp_path / "model", "old")
    for extra in ("x", "y"):
        (tmp_path / "model" / extra).write_text("mine")
    assert in_process(replace_and_die, tmp_path / "model", name, number) == -signal.SIGKILL
    assert read(tmp_path / "model") == {"new" if name == "rmtree" else "old"}
    left = [path for path in tmp_path.iterdir() if path.name.startswith(SCRATCH)]
    assert len(left) == 1
    os.utime(left[0], (time.time() - 60,) * 2)
    replace(tmp_path / "model", "newer")
    assert read(tmp_path / "model") == {"newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_never_sees_a_mixture(tmp_path):
    """While another process replaces the folder two hundred times."""
    replace(tmp_path / "model", "0")
    writer = CONTEXT.Process(target=partial(_replace_often, tmp_path / "model"))
    writer.start()
    seen = set()
    while writer.is_alive():
        folder = os.open(tmp_path / "model", os.O_RDONLY)  # the folder of one moment
        try:
            values = set()
            for name in ("a.txt", "unet/b.txt"):
                with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:  # noqa: PTH123
                    values.add(file.read())
            assert len(values) == 1
            seen |= values
        except FileNotFoundError:  # this old folder is being removed
            pass
        finally:
            os.close(folder)
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 5


def _replace_often(folder):
    for number in range(200):
        replace(folder, str(number))


def test_scratch_of_a_living_process_stays(tmp_path):
    """However old it is; one that nobody holds goes, unless it is young; somebody else's folder stays."""
    with scratch(tmp_path) as ours:
        os.utime(ours, (0, 0))
        for name in ("young", "old", "theirs"):
            (tmp_path / f"{SCRATCH}{name}").mkdir()
            (tmp_path / f"{SCRATCH}{name}" / ("thesis.txt" if name == "theirs" else MARK)).touch()
        for name in ("old", "theirs"):
            os.utime(tmp_path / f"{SCRATCH}{name}", (0, 0))
        assert in_process(replace, tmp_path / "model", "new") == 0
        assert ours.is_dir()
        assert (tmp_path / f"{SCRATCH}young").is_dir()
        assert not (tmp_path / f"{SCRATCH}old").exists()
        assert (tmp_path / f"{SCRATCH}theirs" / "thesis.txt").exists()


# a model's parts


def test_a_smaller_model_over_a_larger_one(folders, tmp_path):
    """No part of the old one stays: it loads, as the new one."""
    model = shutil.copytree(folders["XL"], tmp_path / "model")
    (model / "notes.txt").write_text("mine")
    load(folders["1"]).save_pretrained(model)
    assert load(model).model.family.name == "Stable Diffusion"
    assert not (model / "text_encoder_2").exists()
    assert (model / "notes.txt").read_text() == "mine"


def test_the_clip_of_another_model_does_not_stay(folders, tiny_model, tmp_path):
    """A model with a CLIP over another brings its own; one without leaves none. Saved in its own place it keeps it."""
    stored(included_model("scenes-64")).save_pretrained(tmp_path / "x")
    of_default = (tmp_path / "x" / "clip" / "open_clip_model.safetensors").read_bytes()
    stored(tmp_path / "x").save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "clip" / "open_clip_model.safetensors").read_bytes() == of_default
    stored(tiny_model).save_pretrained(tmp_path / "x")
    own = (tiny_model / "clip" / "open_clip_model.safetensors").read_bytes()
    assert (tmp_path / "x" / "clip" / "open_clip_model.safetensors").read_bytes() == own != of_default
    stored(folders["1"]).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x" / "clip").exists()


def test_parts_that_were_not_saved_together(call, tiny_model, tmp_path):
    """A U-Net beside the text encoder of another training is refused; a card without hash takes any."""
    from latentdiff import LatentDiffusionPipeline

    model = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("openvino"))
    card = json.loads((model / "latentdiff.json").read_text())
    assert len(card["weights"]) == 64
    other = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")
    next(other.model.parts["text_encoder"].parameters()).data.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    shutil.rmtree(model / "text_encoder")
    shutil.copytree(tmp_path / "other" / "text_encoder", model / "text_encoder")
    with pytest.raises(ModelError, match="the weights were not saved together"):
        LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    code, _, err = call("generate", "a", "-m", model)
    assert (code, err.count("\n")) == (4, 1)
    del card["weights"]
    (model / "latentdiff.json").write_text(json.dumps(card))
    LatentDiffusionPipeline.from_pretrained(model, device="cpu")


def test_another_precision_is_saved_together_too(call, tiny_model, tmp_path):
    assert call("convert", tiny_model, tmp_path / "half", "--dtype", "float16")[0] == 0
    assert call("generate", "a", "-m", tmp_path / "half", "--steps", "1", "-o", tmp_path / "x.png")[0] == 0
