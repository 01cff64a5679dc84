"""Files where the user pointed: new, whole, or not there."""

import re
import resource
import signal

import pytest

from latentdiff.core.files import atomic, write_new


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.png"
    write_new(path, b"first")
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        write_new(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: .*a\.png"):
            write_new(tmp_path / "a.png", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_whole_or_not_there(tmp_path):
    """On failure nothing is left; in an existing folder files are replaced and others stay."""
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="halfway"), atomic(folder) as made:
        (made / "unet").mkdir(parents=True)
        raise ValueError("halfway")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic(folder) as made:
            (made / "unet").mkdir(parents=True)
            (made / "unet" / "config.json").write_text(text)
        (folder / "note.txt").write_text("mine")
    files = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"model/unet/config.json": "second", "model/note.txt": "mine"}
    assert list(tmp_path.iterdir()) == [folder]
