"""Checkpoints: whole or not there, whatever happens while one is written or lies on the disk."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch

from latentdiff.core.errors import ModelError, ResourceError
from latentdiff.training import checkpoint
from latentdiff.training.checkpoint import (
    checkpoints,
    damage,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    set_aside,
)

TENSORS = {"unet": {"w": torch.arange(300.0)}, "ema": {"w": torch.arange(300.0) / 2}}


STATE = {"micro_batch": 4, "batching": {"batch_size": 4, "accumulation_steps": 1, "processes": 1}}


def save(directory, step, keep=2, tensors=TENSORS):
    need = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    return save_checkpoint(directory, tensors.items(), need, {**STATE, "step": step, "position": 4 * step}, keep)


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 10)
    tensors, state = load_checkpoint(path)
    assert all(torch.equal(tensors[part]["w"], TENSORS[part]["w"]) for part in TENSORS)
    assert state == {**STATE, "step": 10, "position": 40}
    assert damage(path) is None
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (
        set(manifest)
        == {"unet.safetensors", "ema.safetensors", "state.json"}
        == {file.name for file in path.iterdir()} - {"MANIFEST.json"}
    )


def test_files_have_the_umasks_mode(tmp_path):
    before = os.umask(0o022)
    try:
        path = save(tmp_path, 10)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]


DAMAGES = {
    "ema.safetensors: 1,172 of 1,272 bytes": lambda path: _cut(path / "ema.safetensors", 100),
    "unet.safetensors: its content was changed": lambda path: _flip(path / "unet.safetensors"),
    "unet.safetensors is missing": lambda path: (path / "unet.safetensors").unlink(),
    "no MANIFEST.json": lambda path: (path / "MANIFEST.json").unlink(),
    "MANIFEST.json cannot be read": lambda path: (path / "MANIFEST.json").write_text("[" * 100_000),
    "MANIFEST.json lists no files": lambda path: (path / "MANIFEST.json").write_text("{}"),
    "state.json: 0 of 134 bytes": lambda path: (path / "state.json").write_text(""),
}


def _cut(file, count):
    file.write_bytes(file.read_bytes()[:-count])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_one_is_named_skipped_and_left(tmp_path, fault):
    good, bad = save(tmp_path, 20), save(tmp_path, 30)
    DAMAGES[fault](bad)
    before = {file.name: file.read_bytes() for file in bad.iterdir()}
    assert damage(bad) == fault
    path, warnings = newest_whole(tmp_path)
    assert (path, warnings) == (good, [f"checkpoint step-30 is damaged ({fault}); using step-20"])
    save(tmp_path, 40, keep=3)
    assert {file.name: file.read_bytes() for file in bad.iterdir()} == before


def test_what_lacks_bytes_is_neither_pruned_nor_counted(tmp_path):
    good, bad = save(tmp_path, 20), save(tmp_path, 30)
    _cut(bad / "ema.safetensors", 1)
    save(tmp_path, 40)
    assert checkpoints(tmp_path) == [good, bad, tmp_path / "step-00000040"]
    save(tmp_path, 50)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000030", "step-00000040", "step-00000050"]


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    path = save(tmp_path, 10)
    manifest = {"../../secret": {"bytes": 1, "sha256": "0"}}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert damage(path) == "MANIFEST.json lists no files"


def test_what_is_not_ours_is_left(tmp_path):
    """Folders of other names, files, and what a link points to; the link itself is pruned as a checkpoint would be."""
    elsewhere = save(tmp_path / "elsewhere", 10)
    run = tmp_path / "run"
    save(run, 20)
    (run / "step-00000010").symlink_to(elsewhere)
    (run / "step-notes").mkdir()
    (run / ".tmp-notes").write_text("mine")
    (run / ".tmp-step-00000007").write_text("a kill's")
    save(run, 30)
    assert damage(elsewhere) is None
    assert sorted(path.name for path in run.iterdir()) == [".tmp-notes", "step-00000020", "step-00000030", "step-notes"]


def test_a_name_that_is_taken_is_put_aside(tmp_path):
    path = save(tmp_path, 10)
    _cut(path / "ema.safetensors", 1)
    damaged = (path / "ema.safetensors").read_bytes()
    assert damage(save(tmp_path, 10)) is None
    assert (tmp_path / "aside-1-step-00000010" / "ema.safetensors").read_bytes() == damaged
    set_aside(path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["aside-1-step-00000010", "aside-2-step-00000010"]


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("boundary", range(1, 8))
def test_stopped_at_every_boundary_of_its_files(tmp_path, monkeypatch, boundary):
    """Each file, the manifest and the folders are flushed once, in this order: before the rename the one before is
    the newest, after it the new one; both are whole.
    """
    save(tmp_path, 20)
    calls = [0]
    flush = checkpoint.flush

    def flush_or_die(path):
        calls[0] += 1
        if calls[0] == boundary:
            raise KilledError
        flush(path)

    monkeypatch.setattr(checkpoint, "flush", flush_or_die)
    if boundary < 7:
        with pytest.raises(KilledError):
            save(tmp_path, 30)
    else:
        save(tmp_path, 30)
        assert calls == [6], "three files, manifest, folder, parent"
    expected = "step-00000030" if boundary > 5 else "step-00000020"
    path, warnings = newest_whole(tmp_path)
    assert (path.name, warnings) == (expected, [])
    monkeypatch.undo()
    save(tmp_path, 30)
    assert [file.name for file in sorted(tmp_path.iterdir()) if file.name.startswith(".tmp")] == []


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it. The one before is good, and nothing is left of the new one."""
    large = {"unet": {"w": torch.zeros(750_000)}}
    save(tmp_path, 20, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(ResourceError) as stopped:
            save(tmp_path, 30, keep=1, tensors=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    free = shutil.disk_usage(tmp_path).free / 1e6
    message = str(stopped.value)
    assert message.startswith("disk full while writing step-30 (need 3.0 MB, ")
    assert message.endswith(f" MB free in {tmp_path}). Last good: step-20")
    assert float(message.split("need 3.0 MB, ")[1].split(" ")[0]) == pytest.approx(free, rel=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    assert damage(tmp_path / "step-00000020") is None


def test_a_disk_that_fails_otherwise_is_told(tmp_path, monkeypatch):
    def flush(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "flush", flush)
    with pytest.raises(ResourceError, match=r"cannot write step-30 .*Input/output error"):
        save(tmp_path, 30)
    assert list(tmp_path.iterdir()) == []


ODD = [("step", value) for value in (-5, "12", 12.7, True, None, 10**30)] + [("position", -16), ("micro_batch", 0)]
ODD += [("batching", value) for value in ([], {"batch_size": 0}, {"batch_size": "4"})] + [("micro_batch", "a")]
ODD_STATES = [json.dumps({**STATE, "step": 1, "position": 4, name: value}) for name, value in ODD]


@pytest.mark.parametrize("state", ["[]", "{}", "", "[" * 100_000, '{"step": Infinity}', *ODD_STATES])
def test_a_state_that_says_nothing_sensible(tmp_path, state):
    path = save(tmp_path, 10)
    (path / "state.json").write_text(state)
    with pytest.raises(ModelError, match=r"step-00000010 is damaged \(state.json"):
        load_checkpoint(path)
