"""Many pictures: the same ones however they are shared between processes, and however often those are killed."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from latentdiff.cli.batches import Process
from latentdiff.core.errors import ConfigError

from .conftest import ROOT
from .forked import Started

COLORS, SHAPES = ("red", "green", "blue", "yellow", "pink"), ("circle", "square", "star", "ring")
WORDS = ("generate", "--prompts-file", "prompts.txt", "-s", "5", "--steps", "2", "--device", "cpu")


def prompts(folder, count):
    lines = [f"a {COLORS[i % 5]} {SHAPES[i % 4]} and {i}" for i in range(count)]
    (folder / "prompts.txt").write_text("\n".join(lines))


def start(folder, *words, **environment):
    return Started(*WORDS, *words, cwd=folder, env=environment)


def ended(started):
    """The paths that a command printed, and its standard error."""
    code, err = started.ended()
    assert code == 0, err
    return started.printed().split(), err


def launch(folder, processes, *words):
    """The same by torchrun."""
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", str(processes))
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "latentdiff", *WORDS, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after(pid, folder, count):
    """SIGKILL to a command and all that it has started, once there are so many pictures more."""
    before = len(list(folder.glob("*")))
    while len(list(folder.glob("*"))) < before + count:
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        time.sleep(0.01)
    for one in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:  # launchers' have own groups
        one.kill()


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


def same(result, expected):
    assert result.keys() == expected.keys()
    assert all((result[name] == expected[name]).all() for name in expected)


@pytest.mark.slow
def test_killed_and_gone_on_with_by_others(tmp_path):
    """One process is killed; two go on, of which one is killed; a single one ends it."""
    prompts(tmp_path, 22)
    paths, err = ended(start(tmp_path, "-o", "whole", "--batch-size", "4"))
    assert (len(paths), err) == (22, "")
    words, killed = ("-o", "killed", "--batch-size", "4", "--resume"), tmp_path / "killed"
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "2"}):
        started = start(tmp_path, *words, **environment)
        kill_after(started.process.pid, killed, 1)
        assert started.ended()[0] == -signal.SIGKILL
    ended(start(tmp_path, *words, RANK="1", WORLD_SIZE="2"))
    before = {path.name: path.stat().st_mtime_ns for path in killed.iterdir()}
    paths, err = ended(start(tmp_path, *words))
    assert len(paths) == 22 - len(before), "none twice"
    assert err == f"{len(before)} of 22 pictures are there already\n"
    assert all((killed / name).stat().st_mtime_ns == at for name, at in before.items()), "none again"
    same(pixels(killed), pixels(tmp_path / "whole"))


@pytest.mark.slow
def test_a_thousand_prompts_by_torchrun(tmp_path):
    prompts(tmp_path, 1000)
    ended(start(tmp_path, "-o", "whole"))
    words, killed = ("-o", "killed", "--resume"), tmp_path / "killed"
    first = start(tmp_path, *words)  # its folder goes with it
    kill_after(first.process.pid, killed, 150)
    second = launch(tmp_path, 3, *words)
    kill_after(second.pid, killed, 200)
    second.communicate()
    last = launch(tmp_path, 2, *words)
    out, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    same(pixels(killed), pixels(tmp_path / "whole"))
    print(f"1,000 pictures, the last {len(out.split())} by two processes: the same files, to the bit")


@pytest.fixture
def generate(call, tmp_path):
    """Exit code and stderr."""
    prompts(tmp_path, 3)

    def run(*words):
        code, _, err = call(*words)
        return code, err

    return run


def test_what_is_there_is_another_picture(generate):
    assert generate(*WORDS, "-o", "out")[0] == 0
    assert generate(*WORDS, "-o", "out", "--resume") == (0, "3 of 3 pictures are there already\n")
    there = (0, "3 of 3 pictures are there already\n")
    code, err = generate(*WORDS, "-o", "out", "--resume", "--speed", "fast", "--runtime", "torch")
    warning = "warning: some existing pictures were drawn by openvino in (bfloat16|float32), (exact|max), "
    warning += "the rest by torch in float32, fast"
    assert code == 0
    assert re.fullmatch(f"{warning}\n{there[1]}", err)
    code, err = generate(*WORDS, "-o", "out", "--resume", "--cfg", "4")
    assert (code, err) == (2, "error: out/00001-5.png is another picture (request differs). Name another folder\n")
    assert generate(*WORDS, "-o", "out", "--resume", "--cfg", "4", "--no-metadata")[0] == 0, "by name alone"


def test_one_file(generate):
    words = ("generate", "a red circle", "-s", "1", "--steps", "1", "-o", "one.png")
    assert generate(*words, "--resume") == (0, "")
    assert generate(*words, "--resume") == (0, "1 of 1 pictures are there already\n")
    assert generate(*words) == (2, "error: file exists (one.png). Pictures are never overwritten\n")


def test_a_seed_is_needed(generate, monkeypatch):
    message = "requires --seed: without it each start draws other pictures\n"
    assert generate("generate", "a red circle", "--resume") == (2, f"error: --resume {message}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate("generate", "a red circle") == (2, f"error: a command of several processes {message}")


@pytest.mark.parametrize(
    "lines", [['{"prompt": "a", "seed": null}'], ['{"prompt": "a", "seed": null}', '{"prompt": "b"}']]
)
def test_null_is_not_said(generate, tmp_path, lines):
    (tmp_path / "null.jsonl").write_text("\n".join(lines))
    code, err = generate("generate", "--prompts-file", "null.jsonl", "--resume")
    assert (code, "--resume requires --seed" in err) == (2, True)
    words = ("generate", "--prompts-file", "null.jsonl", "--steps", "1", "-s", "4", "-o", "out")
    assert generate(*words, "--resume")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{number:05d}-{number + 3}.png" for number in range(1, len(lines) + 1)
    ]


def test_several_processes_find_their_files_there(generate, tmp_path, monkeypatch):
    """Before anything is drawn."""
    assert generate(*WORDS, "-o", "out")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("latentdiff.drawing.draw.Drawing.__iter__", None)
    code, err = generate(*WORDS, "-o", "out", "--batch-size", "1")
    assert (code, err) == (2, "error: file exists (out/00002-6.png). Use --resume, or name another folder\n")


def test_shares(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    share = Process.of_launcher()
    assert share == Process(3, 4, 1)
    monkeypatch.setattr("latentdiff.runtime.choice.gpu_is_there", lambda: True)
    assert [share.device(name) for name in (None, "cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:1", "cuda:3", "cpu"]
    assert Process().device(None) is None, "alone it is torch's to choose"
    monkeypatch.setattr("latentdiff.runtime.choice.gpu_is_there", lambda: False)
    assert share.device(None) is None
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match=r"RANK below WORLD_SIZE \(got 4, 4, 1\)"):
        Process.of_launcher()
    monkeypatch.setenv("RANK", "9" * 5000)
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE and LOCAL_RANK must be numbers"):
        Process.of_launcher()
