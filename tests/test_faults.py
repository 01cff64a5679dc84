"""Kills, signals and refusals, on the command line: what a run survives, to the bit, and what it says.

The runs are configs/scenes-tiny.toml made shorter. `whole` is the uninterrupted one; the others must end as it did.
"""

import json
import os
import re
import shutil
import signal
from functools import partial

import pytest

from . import forked
from .forked import assert_bitwise, logged_steps, train

SIGTERM, SIGINT = partial(forked.send, signal.SIGTERM), partial(forked.send, signal.SIGINT)


def denoiser(run, *words, hook=None, changes=(), env=None):
    """Its third stage alone; exit code and stderr."""
    return train(run, "--stage", "denoiser", *words, hook=hook, changes=changes, env=env).ended()


def lines_of(err):
    """The lines on stderr that are not the plan's or a bar's."""
    lines = [line.strip() for line in re.split("[\r\n]", err)]
    return [line for line in lines if re.match("error|warning|saved|micro-batch|a new run", line)]


@pytest.mark.slow
def test_killed_three_times_in_three_stages(whole, tmp_path):
    """Once in each stage, the last between the two parts of an accumulated step: the ends are the same bits."""
    run = tmp_path / "run"
    for stage, call in (("autoencoder", 5), ("clip", 4), ("denoiser", 2 * 7 + 2)):
        assert train(run, hook=partial(forked.in_loss, stage, call)).ended()[0] == -signal.SIGKILL
    code, err = train(run, "--resume", "latest").ended()
    assert (code, lines_of(err)) == (0, [])
    assert "denoiser: 7 of 13 steps from step-6" in err
    assert_bitwise(whole, run)
    for stage, last in (("autoencoder", 9), ("clip", 6), ("denoiser", 13)):
        assert logged_steps(run, stage) == list(range(1, last + 1))
    names = {file.name for file in (whole / "model" / "unet").iterdir()}
    for name in names:
        assert (run / "model" / "unet" / name).read_bytes() == (whole / "model" / "unet" / name).read_bytes()


@pytest.mark.slow
def test_killed_with_any_number_of_workers(whole, begun):
    """0, then 2, then 4: at the exact end of an epoch (40 pictures, 16 a step), and in the step that straddles one."""
    for workers, call in ((0, 2 * 5 + 1), (2, 2 * 4 + 2)):
        hook = partial(forked.in_loss, "denoiser", call)
        code, err = denoiser(begun, hook=hook, changes=[f"denoiser.training.num_workers={workers}"])
        assert code == -signal.SIGKILL, err
    code, err = denoiser(begun, "--resume", "latest", changes=["denoiser.training.num_workers=4"])
    assert code == 0, err
    assert_bitwise(whole, begun, ["denoiser"])
    assert logged_steps(begun) == list(range(1, 14))


@pytest.mark.slow
def test_every_sample_once_an_epoch(whole, begun, tmp_path):
    """Through a kill and to the last epoch, which 13 steps leave unfinished: 5 epochs of 40 and 8 more."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    kill = partial(forked.in_loss, "denoiser", 9)
    assert denoiser(begun, hook=partial(forked.recording, first, kill))[0] == -signal.SIGKILL
    assert denoiser(begun, hook=partial(forked.recording, second))[0] == 0
    lines = [json.loads(line) for path in (first, second) for line in path.read_text().splitlines()]
    made = lines[: 2 * 3] + lines[-2 * 10 :]  # up to the checkpoint of step 3, and what came after it
    samples = [tuple(sample) for line in made for sample in line]
    rows = [row for row, _ in samples]
    assert [len(set(rows[first : first + 40])) for first in range(0, 200, 40)] == [40] * 5
    assert len(samples) == len(set(samples)) == 208, "no noise twice"


@pytest.mark.slow
@pytest.mark.parametrize("boundary", range(1, 8))
def test_killed_while_saving(whole, begun, boundary):
    """At boundaries of the second checkpoint's files (three tensors' and the state, manifest, folder, its parent)."""
    hook = partial(forked.in_save, 7 + boundary)
    assert denoiser(begun, hook=hook, changes=["denoiser.training.validation_steps=13"])[0] == -signal.SIGKILL
    folders = sorted(path.name for path in (begun / "denoiser" / "checkpoints").iterdir())
    renamed = boundary == 7
    assert folders == (["step-00000003", "step-00000006"] if renamed else [".tmp-step-00000006", "step-00000003"])
    code, err = denoiser(begun, "--resume", "latest")
    assert (code, lines_of(err)) == (0, [])
    assert f"from step-{6 if renamed else 3} " in err
    assert_bitwise(whole, begun, ["denoiser"])


@pytest.mark.slow
def test_a_damaged_checkpoint(whole, begun):
    """Named, skipped and left in place by `latest`; refused by its path, and then nothing is written."""
    assert denoiser(begun, hook=partial(forked.in_loss, "denoiser", 2 * 7 + 1))[0] == -signal.SIGKILL
    newest = begun / "denoiser" / "checkpoints" / "step-00000006"
    file = newest / "unet.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    code, err = denoiser(begun, "--resume", newest)
    fault = f"(unet.safetensors: {size - 100:,} of {size:,} bytes)"
    assert (code, lines_of(err)) == (
        4,
        [f"error: checkpoint {newest} is damaged {fault}. Use --resume latest for the newest whole one"],
    )
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before
    code, err = denoiser(begun, "--resume", "latest", hook=partial(forked.in_loss, "denoiser", 2))
    assert lines_of(err) == [f"warning: checkpoint step-6 is damaged {fault}; using step-3"]
    assert file.stat().st_size == size - 100
    assert denoiser(begun)[0] == 0
    assert_bitwise(whole, begun, ["denoiser"])


def test_nothing_to_resume(begun):
    code, err = denoiser(begun, "--resume", "latest")
    where = begun / "denoiser" / "checkpoints"
    assert (code, lines_of(err)) == (4, [f"error: no checkpoint in {where}. Use --resume auto to start fresh"])
    code, err = denoiser(begun, "--resume", "auto", "--dry-run")
    assert (code, lines_of(err)) == (0, [f"a new run: no checkpoint in {where}"])
    assert not (begun / "denoiser").exists()


def test_changed_settings_are_listed(whole, begun):
    shutil.copytree(whole / "denoiser", begun / "denoiser")
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    changes = ["data.count=39", "denoiser.training.train_batch_size=16"]
    code, err = denoiser(begun, "--resume", "latest", changes=changes)
    assert (code, lines_of(err)) == (
        2,
        [
            "error: cannot resume: dataset changed (40 -> 39 images); denoiser batch 16 -> 32. "
            "Use --allow-changed to accept, or another run folder"
        ],
    )
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before
    longer = [*changes, "denoiser.training.max_train_steps=14"]
    code, err = denoiser(begun, "--resume", "latest", "--allow-changed", changes=longer)
    assert code == 0
    assert lines_of(err)[:2] == [
        "warning: going on although dataset changed (40 -> 39 images)",
        "warning: going on although denoiser batch 16 -> 32",
    ]
    assert forked.tensors_of(begun)[0] == 14


def test_a_folder_that_cannot_be_written(tmp_path):
    """Found before anything is built, by a user who may not write there."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir()
    code, err = train(locked / "run", hook=partial(forked.as_nobody, locked)).ended()
    assert (code, err) == (2, f"error: cannot write to {locked / 'run'} (permission denied)\n")
    assert list(locked.iterdir()) == []


def test_without_network_or_global_generators(whole, tmp_path):
    """From the first step to the saved model, with global generators seeded otherwise and refusing; modes are 0644."""
    run = tmp_path / "run"
    code, err = train(run, hook=forked.isolated_and_poisoned, env={"HF_HUB_OFFLINE": "0"}).ended()
    assert code == 0, err
    assert_bitwise(whole, run)
    mask = os.umask(0o022)
    os.umask(mask)
    modes = {path: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert {mode for mode in modes.values()} == {0o666 & ~mask}


@pytest.mark.parametrize(
    ("hook", "act", "code", "step"),
    [
        pytest.param(partial(forked.in_loss, "denoiser", 2 * 4 + 1), SIGTERM, 143, 5, marks=pytest.mark.slow),
        (partial(forked.in_loss, "denoiser", 2 * 4 + 2), SIGINT, 130, 5),
        pytest.param(forked.in_validation, SIGTERM, 143, 4, marks=pytest.mark.slow),
        pytest.param(forked.in_caching, SIGTERM, 143, None, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM in a step", "SIGINT in a step", "SIGTERM in validation", "SIGTERM in caching"],
)
def test_signals_save_and_stop(whole, begun, hook, act, code, step):
    changes = ["denoiser.training.validation_steps=4"] if hook is forked.in_validation else []
    result, err = denoiser(begun, hook=partial(hook, act=act), changes=changes)
    name = act.args[0].name
    message = f"saved step-{step} after {name}" if step else f"error: stopped by {name}. Run the same command to resume"
    assert (result, lines_of(err)[-1]) == (code, message)
    assert not list((begun / "cache").glob(".tmp*"))
    result, err = denoiser(begun, "--resume", "latest" if step else "auto", changes=changes)
    assert result == 0, err
    assert_bitwise(whole, begun, ["denoiser"])
    assert logged_steps(begun) == list(range(1, 14))


def test_a_second_signal_stops_at_once(begun):
    """While the step of the first is still computed: nothing is saved, nothing half."""
    code, err = denoiser(begun, hook=partial(forked.in_loss, "denoiser", 9, forked.insist))
    assert (code, lines_of(err)) == (
        143,
        ["a new run: no checkpoint in " + str(begun / "denoiser" / "checkpoints")],
    )
    assert [path.name for path in (begun / "denoiser" / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.slow
def test_a_signal_to_the_whole_group(whole, begun):
    """Loader workers get it too, and still make the batch that the step in hand needs."""
    workers = ["denoiser.training.num_workers=2"]
    hook = partial(forked.in_loss, "denoiser", 2 * 4 + 1, forked.signal_the_group)
    code, err = denoiser(begun, hook=hook, changes=workers)
    assert (code, lines_of(err)[-1]) == (143, "saved step-5 after SIGTERM")
    assert denoiser(begun, "--resume", "latest", changes=workers)[0] == 0
    assert_bitwise(whole, begun, ["denoiser"])


def test_a_signal_is_not_taken_for_damage(begun):
    """While a library loads, whatever handles its errors."""
    code, err = denoiser(begun, hook=partial(forked.in_loading, SIGTERM))
    assert (code, lines_of(err)[-1]) == (143, "error: stopped by SIGTERM. Run the same command to resume")


def test_a_full_disk_while_a_network_is_saved(begun):
    shutil.rmtree(begun / "clip")
    code, err = train(begun, "--stage", "clip", hook=partial(forked.with_full_disk_at_the_end, 100_000)).ended()
    assert code == 6
    assert re.fullmatch(r"error: cannot write CLIP \(.*\): .*File too large.*", lines_of(err)[-1])


def test_one_run_folder_one_process(begun):
    first = train(begun, "--stage", "denoiser", hook=partial(forked.in_loss, "denoiser", 1, forked.wait))
    while not (begun / "denoiser" / "log.jsonl").exists():
        assert first.process.is_alive(), first.err.read_text()
        first.process.join(0.1)
    code, err = denoiser(begun)
    first.process.kill()
    message = f"error: another process is training in {begun}. Wait for it, or name another folder"
    assert (code, lines_of(err)[-1]) == (2, message)


@pytest.mark.slow
def test_without_caches_the_same_is_learnt(whole, begun):
    """Pictures and captions encoded in every step are the cached ones, to the bit."""
    assert denoiser(begun, changes=["denoiser.cache=false"])[0] == 0
    assert not list((begun / "cache").glob("*/*.safetensors"))
    forked.assert_bitwise(whole, begun, ["denoiser"])


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(whole, begun):
    assert denoiser(begun, changes=["denoiser.gradient_checkpointing=true"])[0] == 0
    (_, expected), (_, result) = forked.tensors_of(whole), forked.tensors_of(begun)
    assert all((expected[name] - result[name]).abs().max() < 1e-6 for name in expected)


@pytest.mark.slow
def test_a_full_disk_stops_the_run(whole, begun):
    """A limit on the size of files stands for it: one line, the last good step, and it goes on when there is room."""
    assert denoiser(begun, hook=partial(forked.in_loss, "denoiser", 2 * 4 + 1))[0] == -signal.SIGKILL
    code, err = denoiser(begun, "--resume", "latest", hook=partial(forked.with_files_up_to, 100_000))
    assert code == 6
    message = r"error: disk full while writing step-6 \(need [\d.]+ MB, [\d.]+ MB free in .*\)\. Last good: step-3"
    assert re.fullmatch(message, lines_of(err)[-1])
    assert [path.name for path in (begun / "denoiser" / "checkpoints").iterdir()] == ["step-00000003"]
    assert denoiser(begun, "--resume", "latest")[0] == 0
    assert_bitwise(whole, begun, ["denoiser"])


@pytest.mark.slow
def test_deterministic_kernels_are_the_same_on_a_cpu(whole, begun):
    """On a CPU every kernel is deterministic as it is; the switch costs nothing there and changes nothing."""
    code, err = denoiser(
        begun, "--deterministic", hook=partial(forked.in_loss, "denoiser", 1, forked.check_deterministic)
    )
    assert code == 0, err
    assert_bitwise(whole, begun, ["denoiser"])


@pytest.mark.slow
def test_compiled_stopped_while_it_compiles_and_resumed(begun, tmp_path):
    """SIGTERM in the first step, whose compilation takes a minute: saved after it, and bitwise resumed."""
    other = shutil.copytree(begun, tmp_path / "other")
    compiled = ["denoiser.training.compile=true", "denoiser.training.max_train_steps=4"]
    assert denoiser(other, changes=compiled)[0] == 0
    code, err = denoiser(begun, hook=partial(forked.in_loss, "denoiser", 1, SIGTERM), changes=compiled)
    assert (code, lines_of(err)[-1]) == (143, "saved step-1 after SIGTERM")
    assert denoiser(begun, "--resume", "latest", changes=compiled)[0] == 0
    assert_bitwise(other, begun, ["denoiser"])
