"""Files where the user pointed: new, whole, or not there."""

import resource
import signal

import pytest

from latentdiff.cli.output import write_new


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.png"
    write_new(path, b"first")
    with pytest.raises(FileExistsError):
        write_new(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_new(tmp_path / "a.png", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
