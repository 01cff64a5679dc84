"""Several processes that share the batches (DDP over gloo) against one: the same samples, noise, losses and stops."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from latentdiff.networks.clip import contrastive_loss

from . import forked
from .conftest import ROOT
from .forked import SHORT, assert_bitwise, logged_steps, ranks, train
from .small import logged

# 16 pictures a step: one process takes 8 twice, two take 8 once
SHARED = ("denoiser.training.gradient_accumulation_steps=1",)
WORDS = ("--stage", "denoiser")


def all_ended(processes):
    return [process.ended() for process in processes]


def samples(paths, batches):
    """What each step learnt from, a set of (row, hash of its draws) a step, from the records of all processes."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    steps = len(lines[0]) // batches
    return [
        {tuple(sample) for record in lines for line in record[step * batches : (step + 1) * batches] for sample in line}
        for step in range(steps)
    ]


@pytest.fixture(scope="module")
def both(whole, tmp_path_factory):
    """The denoiser trained by one process and by two, with records of what they learnt from."""
    folder = tmp_path_factory.mktemp("both")
    for name in ("one", "two"):
        shutil.copytree(whole / "clip", folder / name / "clip", ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(whole / "model" / "vae", folder / name / "model" / "vae")
    code, err = train(folder / "one", *WORDS, hook=partial(forked.recording, folder / "one-0.jsonl")).ended()
    assert code == 0, err
    hooks = {rank: partial(forked.recording, folder / f"two-{rank}.jsonl") for rank in range(2)}
    for code, err in all_ended(ranks(2, folder / "two", *WORDS, hooks=hooks, changes=SHARED)):
        assert code == 0, err
    return folder


@pytest.mark.slow
def test_two_processes_learn_from_what_one_learns_from(both):
    """Sample ids and hashes of noise, posterior, time and caption dropout at every step; losses within 1e-5."""
    one = samples([both / "one-0.jsonl"], 2)
    two = samples([both / "two-0.jsonl", both / "two-1.jsonl"], 1)
    assert len(one) == 13
    assert one == two
    assert all(len(step) == 16 for step in one)
    losses = [[row["loss"] for row in logged(both / name / "denoiser") if "loss" in row] for name in ("one", "two")]
    difference = np.abs(np.subtract(*losses)).max()
    print(f"largest difference of the losses of two processes and one over 13 steps: {difference:.1e}")
    assert difference < 1e-5
    (_, alone), (_, shared) = forked.tensors_of(both / "one"), forked.tensors_of(both / "two")
    for name in alone:
        torch.testing.assert_close(alone[name], shared[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_rerun_is_bitwise_the_same(both, begun):
    """SIGKILL of one rank: the other does not go on alone; at the same number of processes the end is the same."""
    processes = ranks(2, begun, *WORDS, hooks={1: partial(forked.in_loss, "denoiser", 8)}, changes=SHARED)
    processes[1].process.join(100)
    assert processes[1].process.exitcode == -signal.SIGKILL
    assert processes[0].ended()[0] not in (0, None)
    for code, err in all_ended(ranks(2, begun, *WORDS, "--resume", "latest", changes=SHARED)):
        assert code == 0, err
    assert_bitwise(both / "two", begun, ["denoiser"])
    assert logged_steps(begun) == list(range(1, 14))


@pytest.mark.slow
def test_two_go_on_as_one(both, begun, tmp_path):
    """One warning; the samples and noise of the steps that are left, and their losses."""
    kill = partial(forked.in_loss, "denoiser", 8)
    assert all(code != 0 for code, _ in all_ended(ranks(2, begun, *WORDS, hooks={0: kill, 1: kill}, changes=SHARED)))
    record = tmp_path / "record.jsonl"
    code, err = train(begun, *WORDS, "--resume", "latest", hook=partial(forked.recording, record)).ended()
    assert code == 0, err
    warnings = [line for line in re.split("[\r\n]", err) if line.startswith("warning")]
    assert len(warnings) == 1
    assert "the same samples, sums rounded otherwise" in warnings[0]
    assert samples([record], 2) == samples([both / "one-0.jsonl"], 2)[6:]
    losses = [[row["loss"] for row in logged(run / "denoiser") if "loss" in row] for run in (both / "one", begun)]
    assert np.abs(np.subtract(*losses)).max() < 1e-5


@pytest.mark.slow
def test_a_finished_run_is_only_saved_again(both, tmp_path):
    """Both processes agree that nothing is left to train or to report; were they not, one would wait for ever."""
    run = shutil.copytree(both / "two", tmp_path / "two")
    for code, err in all_ended(ranks(2, run, *WORDS, changes=SHARED)):
        assert code == 0, err
    assert logged(run / "denoiser") == logged(both / "two" / "denoiser")


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step(both, begun):
    hooks = {1: partial(forked.in_loss, "denoiser", 8, partial(forked.send, signal.SIGTERM))}
    ended = all_ended(ranks(2, begun, *WORDS, hooks=hooks, changes=SHARED))
    assert [code for code, _ in ended] == [143, 143]
    assert all("saved step-8 after SIGTERM" in err for _, err in ended)
    assert sorted(path.name for path in (begun / "denoiser" / "checkpoints").glob("step-*"))[-1] == "step-00000008"
    for code, err in all_ended(ranks(2, begun, *WORDS, "--resume", "latest", changes=SHARED)):
        assert code == 0, err
    assert_bitwise(both / "two", begun, ["denoiser"])


def test_memory_that_ends_in_one_of_two_processes_is_told(begun):
    """They would wait for each other's gradients for ever, so the batch is not tried again."""
    hooks = {rank: partial(forked.in_loss, "denoiser", 3, forked.exhaust) for rank in range(2)}
    ended = all_ended(ranks(2, begun, *WORDS, hooks=hooks, changes=SHARED))
    assert [code for code, _ in ended] == [6, 6]
    assert all("error: out of memory at step 3 with micro-batch 8" in err for _, err in ended)


def _contrastive(rank, path):
    import torch.distributed as dist

    torch.manual_seed(0)
    images, texts, tower = torch.randn(6, 5), torch.randn(6, 5), nn.Linear(5, 4)
    own = slice(3 * rank, 3 * rank + 3)
    loss = contrastive_loss(rank, 2)(tower(images[own]), tower(texts[own]), torch.tensor(2.0))
    loss.backward()
    for parameter in tower.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    torch.save([loss.detach(), *(parameter.grad for parameter in tower.parameters())], f"{path}-{rank}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_contrastive_loss_is_of_the_whole_batch(tmp_path):
    """Two processes with half a batch each: the loss and, averaged, the gradient of one process with all of it."""
    forked.in_two_processes(_contrastive, tmp_path / "out")
    torch.manual_seed(0)
    images, texts, tower = torch.randn(6, 5), torch.randn(6, 5), nn.Linear(5, 4)
    loss = contrastive_loss()(tower(images), tower(texts), torch.tensor(2.0))
    loss.backward()
    expected = [loss.detach(), *(parameter.grad for parameter in tower.parameters())]
    for rank in range(2):
        result = torch.load(tmp_path / f"out-{rank}", weights_only=True)
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_launcher(whole, begun):
    """`accelerate launch`: a killed process ends the launcher with a failure; the rerun finishes and saves a model."""
    sets = [word for change in (*SHORT, *SHARED) for word in ("--set", change)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, "-m", "latentdiff", "train", ROOT / "configs" / "scenes-tiny.toml", "-o", begun, *WORDS, *sets]
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    checkpoint = begun / "denoiser" / "checkpoints" / "step-00000003"
    while not checkpoint.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    result = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", result[-1]], check=True)
    process.communicate(timeout=120)
    assert process.returncode != 0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert logged_steps(begun) == list(range(1, 14))
    assert (begun / "model" / "unet" / "config.json").is_file()
