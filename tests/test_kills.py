"""SIGKILL at any instant: twenty runs killed at moments spread over the whole chain end as the uninterrupted one."""

import os
import random
import shutil
import signal
import time

import pytest

from .forked import assert_bitwise, logged_steps, train

KILLS = 20


@pytest.mark.slow
def test_killed_at_any_instant(whole, tmp_path, capsys):
    """From the first import to the last file of the model, workers or none; the place of each kill is printed."""
    began = time.monotonic()
    assert train(tmp_path / "timed").ended()[0] == 0
    duration = time.monotonic() - began
    moments = random.Random(0)
    equal, fates = 0, []
    for number in range(KILLS):
        run = tmp_path / f"run-{number}"
        workers = [f"denoiser.training.num_workers={number % 3}"]
        moment = (number + moments.random()) / KILLS * duration
        while (code := _killed(train(run, changes=workers), moment)) != -signal.SIGKILL:
            assert code == 0
            shutil.rmtree(run)  # it was faster than the one that was timed
            moment *= 0.8
        where = [f"{stage} {_last(run, stage)}" for stage in ("autoencoder", "clip", "denoiser") if _last(run, stage)]
        finished, err = train(run, changes=workers).ended()
        try:
            assert finished == 0, err
            assert_bitwise(whole, run)
            assert logged_steps(run) == list(range(1, 14))
            equal += 1
            fate = "equal"
        except AssertionError as error:
            fate = str(error)
        fates.append(f"killed after {', '.join(where) or 'nothing'}: {fate}")
        shutil.rmtree(run)
    with capsys.disabled():
        print("\n" + "\n".join(fates) + f"\n{equal} of {KILLS} runs killed by SIGKILL ended bitwise equal")
    assert equal == KILLS


def _killed(started, seconds):
    """SIGKILL after so many seconds; how the process ended."""
    started.process.join(seconds)
    if started.process.is_alive():
        os.kill(started.process.pid, signal.SIGKILL)
    return started.ended()[0]


def _last(run, stage):
    """The last step that a stage has logged, if it has begun."""
    try:
        return max(logged_steps(run, stage), default=0)
    except (FileNotFoundError, ValueError):
        return 0
