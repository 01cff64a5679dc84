"""Arrays larger than memory: the same numbers, in a file on a disk whose free space is checked first."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latentdiff.evaluation import large_arrays as module
from latentdiff.evaluation.large_arrays import CODED, allocate, batch_size, concatenated


def test_large_pictures_are_few_at_once():
    assert [batch_size(CODED, (side, side), 16) for side in (64, 256, 512, 1024, 4096)] == [16, 16, 4, 1, 1]
    assert batch_size(CODED, (512, 1024), 16) == 2


def test_batches_become_one_array(tmp_path, monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    batches = [pictures[:8], pictures[8:16], pictures[16:]]
    for size in (2**30, 1):
        monkeypatch.setattr(module, "IN_MEMORY", size)
        made = concatenated(iter(batches), 20, tmp_path / "folder")
        assert np.array_equal(made, pictures)
        assert type(made) is np.ndarray
        assert not list(tmp_path.rglob("*.*")), "it has no name"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a system that does not tell")
def test_more_than_there_is_memory(tmp_path):
    """An array of two gigabytes, of which a process holds what it reads."""
    program = (
        "import numpy as np, re; from pathlib import Path; from latentdiff.evaluation.large_arrays import allocate;"
        "made = allocate((2000, 1024, 1024, 1), Path('.'));"
        "made[0], made[-1] = 1, 2; assert made[0].all() and made[-1].min() == 2 and not made[1000].any();"
        "assert int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) < 2**20"  # kB
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a system that cannot ask its disk")
def test_a_disk_that_has_not_the_room(tmp_path, monkeypatch):
    """Told before anything is written, and nothing is left."""
    monkeypatch.setattr(module, "IN_MEMORY", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            allocate((2**20,), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
