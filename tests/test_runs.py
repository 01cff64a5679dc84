"""`latentdiff runs`, the lock behind it, and the plan of a start."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from accelerate import Accelerator

from latentdiff.core.errors import ConfigError
from latentdiff.data.dataset import open_data
from latentdiff.settings.config import load_config
from latentdiff.stages.plan import plan_of
from latentdiff.stages.run import Run, checkpoints_to_resume
from latentdiff.training.lock import is_locked, locked

from .conftest import ROOT

HOLD = "import sys\nfrom pathlib import Path\nfrom latentdiff.training.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


@pytest.fixture
def holder():
    """Another process that holds the lock of a folder."""
    held = []

    def hold(folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout.readline() == b"held\n"
        held.append(process)
        return process

    yield hold
    for process in held:
        process.kill()
        process.communicate()


def test_the_lock_ends_with_its_process(tmp_path, holder):
    process = holder(tmp_path / "run")
    assert is_locked(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training in"), locked(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    assert not is_locked(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_runs_are_listed_with_their_state(command, tiny_run, tmp_path, holder):
    finished = shutil.copytree(tiny_run, tmp_path / "finished", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("stopped", "running", "broken"):
        shutil.copytree(finished, tmp_path / name)
        log = tmp_path / name / "denoiser" / "log.jsonl"
        log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:25]) + '{"step": 26, "lo')
    report = tmp_path / "broken" / "denoiser" / "non-finite.json"
    report.write_text("{}")
    odd = {"text": '{"step": "x", "loss": "y"}', "nested": "[" * 100_000, "nan": '{"step": 1, "loss": NaN}'}
    for name, line in odd.items():
        shutil.copytree(finished, tmp_path / "junk" / name)
        (tmp_path / "junk" / name / "denoiser" / "log.jsonl").write_text(line + "\n")
    for line in command("runs", tmp_path / "junk", "--json").stdout.splitlines():
        assert json.loads(line)["stages"]["denoiser"] == [0, 40]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.toml").write_text("nonsense = 1")
    holder(tmp_path / "running")
    lines = [json.loads(line) for line in command("runs", tmp_path, "--json").stdout.splitlines()]
    states = {line["name"]: line["state"] for line in lines}
    assert states == {
        "broken": "non-finite", "finished": "finished", "odd": "unreadable", "running": "running", "stopped": "stopped",
    }  # fmt: skip
    stopped = lines[-1]
    assert stopped["stages"] == {"autoencoder": [60, 60], "clip": [40, 40], "denoiser": [25, 40]}
    assert stopped["loss"] == json.loads(log.read_text().splitlines()[24])["loss"]
    text = command("runs", tmp_path).stdout.splitlines()
    assert text[1].startswith("finished             finished   20")
    assert "autoencoder 60/60  clip 40/40  denoiser 40/40  loss " in text[1]
    empty = command("runs", tmp_path / "odd")
    assert (empty.stdout, empty.stderr) == ("", f"no runs in {tmp_path / 'odd'}\n")
    missing = command("runs", tmp_path / "nowhere", check=False)
    assert (missing.returncode, missing.stderr.startswith("error: no such folder")) == (2, True)


def test_the_plan_is_the_arithmetic(tiny_run, tmp_path):
    """Batches, steps, epochs, parameters and what a checkpoint takes, which is what one does take."""
    changes = ["denoiser.training.gradient_accumulation_steps=3", "denoiser.training.max_train_steps=100"]
    config = load_config(ROOT / "configs" / "scenes-tiny.toml", changes)
    accelerator, data = Accelerator(cpu=True), open_data(config)
    new = Run(config, tmp_path / "new", accelerator, data, {"clip": None, "denoiser": None})
    fresh = plan_of(new)
    assert fresh[0] == f"run {tmp_path / 'new'} on cpu x 1, mixed precision no, seed 0"
    assert fresh[1] == "clip: 40 of 40 steps to train, 32 x 1 accumulated x 1 processes = 32 pictures a step"
    assert fresh[3] == (
        "denoiser: 100 of 100 steps to train, 8 x 3 accumulated x 1 processes = 24 pictures a step; "
        "256 pictures, 9.4 epochs"
    )
    result, _ = checkpoints_to_resume(tiny_run, ["denoiser"], "latest")
    size = sum(file.stat().st_size for file in result["denoiser"].iterdir()) / 1e6
    resumed = plan_of(Run(config, tiny_run, accelerator, data, result))
    assert resumed[1].startswith(f"denoiser: 60 of 100 steps from step-40 ({result['denoiser']}), 8 x 3")
    estimate = float(resumed[2].split("a checkpoint of ")[1].split(" MB")[0])
    assert estimate == pytest.approx(size, rel=0.1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "multiplies", "keys"),
    [
        ([], False, None),
        (["mixed_precision=bf16", "denoiser.encode_dtype=bfloat16"], True, None),
        (["mixed_precision=bf16"], False, "mixed_precision"),
        (["denoiser.encode_dtype=bfloat16"], False, "denoiser.encode_dtype"),
        (["mixed_precision=bf16", "denoiser.encode_dtype=bfloat16"], False, "mixed_precision, denoiser.encode_dtype"),
    ],
)
def test_a_processor_that_emulates_bfloat16(tmp_path, monkeypatch, changes, multiplies, keys):
    monkeypatch.setattr("latentdiff.stages.plan.multiplies_bfloat16", lambda: multiplies)
    config = load_config(ROOT / "configs" / "scenes-tiny.toml", changes)
    run = Run(config, tmp_path, Accelerator(cpu=True), open_data(config), {"clip": None, "denoiser": None})
    warnings = [line for line in plan_of(run) if "bfloat16" in line]
    expected = f"warning: this processor only emulates bfloat16 ({keys}): float32 is faster here"
    assert warnings == ([] if keys is None else [expected])


def test_memory_that_is_freed_is_kept():
    """A block allocated again costs page faults only before the call, which cannot be undone: hence another process."""
    code = (
        "import resource, torch\nfrom latentdiff.runtime.memory import keep_freed_memory\n"
        "def faults():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def touched():\n    before = faults()\n    for _ in range(20):\n        torch.ones(10_000_000)\n"
        "    return faults() - before\n"
        "touched()\nprint(touched())\nprint(keep_freed_memory())\ntouched()\nprint(touched())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    before, answer, after = done.stdout.split()
    assert answer == "True"
    assert int(before) > 5000
    assert int(after) < int(before) / 10
