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
    """From the first import to the last file of the model, workers or none; where it struck is told."""
    began = time.monotonic()
    assert train(tmp_path / "timed").ended()[0] == 0
    duration = time.monotonic() - began
    moments = random.Random(0)
    equal, told = 0, []
    for number in range(KILLS):
        run = tmp_path / f"run-{number}"
        workers = [f"denoiser.training.num_workers={number % 3}"]
        started = train(run, changes=workers)
        started.process.join((number + moments.random()) / KILLS * duration)
        if started.process.is_alive():
            os.kill(started.process.pid, signal.SIGKILL)
        code, _ = started.ended()
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
        told.append(f"{'killed' if code else 'ended before its kill'} after {', '.join(where) or 'nothing'}: {fate}")
        shutil.rmtree(run)
    with capsys.disabled():
        print("\n" + "\n".join(told) + f"\n{equal} of {KILLS} runs killed by SIGKILL ended bitwise equal")
    assert equal == KILLS


def _last(run, stage):
    """The last step that a stage has logged, if it has begun."""
    try:
        return max(logged_steps(run, stage), default=0)
    except (FileNotFoundError, ValueError):
        return 0
