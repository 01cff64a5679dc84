"""The record that a refactoring is compared with: the same twice, and a change in it is named with its size."""

import json
import subprocess
import sys

import numpy as np
import pytest

from scripts import equal

from .conftest import ROOT


def test_every_difference_is_named():
    first, second = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 3, np.uint8)
    one, other = equal.hash_of(first), equal.hash_of(second)
    assert one != other == equal.hash_of(second.copy())
    before = {"picture: a": one, "picture: b": one, "picture: c": one, "evaluation: e": "[1.0, null]"}
    after = {"picture: a": one, "picture: b": other, "picture: d": one, "evaluation: e": "[2.0, null]"}
    assert equal.differences(before, after, equal.SEEN) == [
        "differs: picture: b (by at most 3, 3 on average)",
        "differs: evaluation: e (1.0 -> 2.0)",
        "missing: picture: c",
        "new: picture: d",
    ]
    assert equal.differences(before, before, {}) == []


@pytest.mark.slow
def test_the_record_is_the_same_twice(tmp_path):
    """All pictures, in two processes."""
    script = [sys.executable, ROOT / "scripts" / "equal.py", "--only", "pictures"]
    subprocess.run([*script, tmp_path / "before.json"], check=True, capture_output=True)
    record = json.loads((tmp_path / "before.json").read_text())["pictures"]
    assert len(record) >= 60
    assert len(set(record.values())) > 0.9 * len(record)
    again = [*script, tmp_path / "after.json", "--against", tmp_path / "before.json"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert (done.returncode, "all entries are equal" in done.stdout) == (0, True), done.stdout
