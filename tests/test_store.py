"""Cached rows are read to the bit; damage, killed writers and full disks raise errors."""

import subprocess
import sys

import pytest
import torch

from latentdiff.core.errors import DataError, ResourceError
from latentdiff.data.store import Store


def keys(first, count):
    return [f"{number:032x}" for number in range(first, first + count)]


def rows(count, shape=(4, 8, 8), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).half()


def test_rows_are_found_by_key(tmp_path):
    """Over several files and shapes, in any order, by another store too."""
    store = Store(tmp_path / "new")
    a, b, c = rows(5), rows(7, seed=1), rows(3, (4, 4, 16), seed=2)
    store.add(keys(0, 5), {"mean": a, "log_variance": -a})
    store.add(keys(5, 7), {"mean": b, "log_variance": -b})
    store.add(keys(12, 3), {"mean": c, "log_variance": -c})
    for opened in (store, Store(tmp_path / "new")):
        assert len(opened) == 15
        result = opened.rows([keys(7, 1)[0], keys(1, 1)[0], keys(7, 1)[0]])
        assert torch.equal(result["mean"], torch.stack([b[2], a[1], b[2]]))
        assert torch.equal(result["log_variance"], -result["mean"])
        assert torch.equal(opened.rows(keys(13, 2))["mean"], c[1:])
        assert opened.missing([*keys(14, 3), *keys(15, 1)]) == keys(15, 2)
    with pytest.raises(DataError, match="has no row"):
        store.rows(keys(99, 1))
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "new").iterdir()} == {"0o644"}


def test_two_writers_of_the_same_rows_agree(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)
    for store in (one, other):
        store.add(keys(0, 5), {"mean": rows(5)})
    assert len(list(tmp_path.iterdir())) == 1
    one.add(keys(5, 2), {"mean": rows(2, seed=1)})
    assert other.missing(keys(0, 7)) == keys(5, 2)
    other.refresh()
    assert torch.equal(other.rows(keys(5, 2))["mean"], rows(2, seed=1))


@pytest.mark.parametrize("where", [10, -1, "cut"])
def test_damage_is_named(tmp_path, where):
    Store(tmp_path).add(keys(0, 5), {"mean": rows(5)})
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if where == "cut":
        content = content[:-10]
    else:
        content[where] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"cached rows are damaged .*{file.name}.*Delete the file"):
        Store(tmp_path)


def test_what_a_killed_writer_leaves_is_no_row(tmp_path):
    Store(tmp_path).add(keys(0, 5), {"mean": rows(5)})
    (file,) = tmp_path.iterdir()
    (tmp_path / ".tmp-123.safetensors").write_bytes(file.read_bytes()[:50])
    assert len(Store(tmp_path)) == 5


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from latentdiff.data.store import Store
from latentdiff.core.errors import ResourceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
store.add(["0" * 32], {"mean": torch.zeros(1, 8)})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.add(["1" * 32], {"mean": torch.zeros(1, 8000)})
except ResourceError as error:
    print(error)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    assert "The rows before are kept" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1
    assert len(Store(tmp_path)) == 1
    assert ResourceError.exit_code == 6


MEMORY = """
import sys, torch
from pathlib import Path
from latentdiff.data.store import Store
def resident():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = resident()
store = Store(Path(sys.argv[1]))
store.rows([f"{n:032x}" for n in range(0, 4000, 100)])
print(resident() - before)
"""


def test_rows_are_mapped_not_loaded(tmp_path):
    """Of 64 MB of rows, opened and read here and there, far less is the process's own memory."""
    store = Store(tmp_path)
    for first in range(0, 4000, 500):
        store.add(keys(first, 500), {"mean": rows(500, (128, 64))})
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16_000  # kB
