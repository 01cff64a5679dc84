"""The record that a refactoring is compared with: the same twice, and a change in it is named with its size."""

import json
import subprocess
import sys
from collections import defaultdict

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
    families = defaultdict(lambda: defaultdict(set))  # ways by model and runtime, then by what they draw
    for name, pixels in record.items():
        *family, way = name.split(", ")
        families[tuple(family)][pixels].add(way)
    for family, groups in families.items():
        for ways in groups.values():
            assert len(ways) == 1 or any(ways <= same for same in equal.SAME), f"{family}: {ways} draw the same"
    again = [*script, tmp_path / "after.json", "--against", tmp_path / "before.json"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert (done.returncode, "all entries are equal" in done.stdout) == (0, True), done.stdout
