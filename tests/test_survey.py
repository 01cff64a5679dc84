"""A data set looked at whole: every picture in one place, nothing changed on disk, no file that stops the rest."""

import hashlib
import json
import time

import numpy as np
import pytest
from PIL import Image

from latentdiff.core.errors import DataError, ResourceError
from latentdiff.data import survey as module
from latentdiff.data.layouts import find
from latentdiff.data.source import Options
from latentdiff.data.survey import as_values, from_values, survey

from .pictures import as_jsonl, broken_pictures, encoded, some_pictures, write_pictures


def surveyed(root, **more):
    return survey(find(str(root), Options()), **more)


def contents(root):
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def broken(tmp_path):
    """Five sound pictures, a truncated one, an empty one and a web page."""
    return as_jsonl(tmp_path / "set", some_pictures(5) | broken_pictures())


def test_bad_pictures_are_all_named(broken):
    result = surveyed(broken)
    reason = (
        '3 of 8 images cannot be read: a.jpg (truncated), b.png (empty), c.jpg (not an image: starts with "<html>")'
    )
    assert result.refusal() == f"{reason}. Mend them or pass --skip-bad"
    with pytest.raises(DataError, match="3 of 8 images cannot be read"):
        result.accepted(skip_bad=False)


def test_quarantine_lists_and_deletes_nothing(broken, tmp_path):
    before = contents(broken)
    result = surveyed(broken).accepted(skip_bad=True)
    result.write_quarantine(tmp_path / "quarantine.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in rows} == {
        "a.jpg": "truncated", "b.png": "empty", "c.jpg": 'not an image: starts with "<html>"',
    }  # fmt: skip
    assert all(row["id"] == hashlib.sha256(before[row["name"]]).hexdigest() for row in rows)
    assert result.count == len(result.pictures) + len(rows) == 8
    assert contents(broken) == before


def test_a_set_of_bad_pictures_is_never_sound(tmp_path):
    as_jsonl(tmp_path, {"a.png": (b"x", "a")})
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        surveyed(tmp_path).accepted(skip_bad=True)


def test_strange_names_come_back_from_the_quarantine(tmp_path):
    names = ["line\nbreak.png", "😀.png", "-n.png", b"latin \xe9.png".decode("utf-8", "surrogateescape")]
    write_pictures(tmp_path / "set", {name: (b"broken", "") for name in names})
    result = surveyed(tmp_path / "set", instance_prompt="x")
    result.write_quarantine(tmp_path / "quarantine.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert all((tmp_path / "set" / row["name"]).read_bytes() == b"broken" for row in rows)
    assert "\n" not in result.refusal()
    assert r"line\nbreak.png" in result.refusal()


def mutated(data, rng):
    """One of what happens to files: bits flipped, cut, a block zeroed, doubled, swapped or made of noise."""
    data, kind = bytearray(data), rng.integers(6)
    if len(data) < 8:
        return bytes(data)
    first, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
    if kind == 0:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[first:]
    elif kind == 2:
        data[first : first + length] = bytes(len(data[first : first + length]))
    elif kind == 3:
        data[first:first] = data[first : first + length]
    elif kind == 4:
        del data[first : first + length]
    else:
        data[first : first + length] = rng.bytes(len(data[first : first + length]))
    return bytes(data)


def seeds():
    """Small pictures of every format and of every colour mode that one of them can hold."""
    rng = np.random.default_rng(1)
    color = Image.fromarray(rng.integers(0, 256, (24, 18, 3), dtype=np.uint8))
    made = {f"rgb.{kind}": encoded(color, kind) for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm")}
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        made[f"{mode}.tiff" if mode == "CMYK" else f"{mode}.png"] = encoded(
            color.convert(mode), "tiff" if mode == "CMYK" else "png"
        )
    frames = [color.rotate(90 * turn) for turn in range(4)]
    for kind in ("gif", "webp"):
        made[f"frames.{kind}"] = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    made["deep.png"] = encoded(Image.fromarray(rng.integers(0, 65536, (24, 18), dtype=np.uint16)))
    exif = Image.Exif()
    exif[0x0112] = 6
    made["turned.jpg"] = encoded(color, "jpg", exif=exif, quality=90, progressive=True)
    made["lzw.tiff"] = encoded(color, "tiff", compression="tiff_lzw")
    return made


def test_two_thousand_mutated_files(tmp_path, capfd):
    """No crash, no hang, every file in exactly one place; what is called sound is decoded."""
    rng, made = np.random.default_rng(0), seeds()
    root = tmp_path / "set"
    root.mkdir()
    for number in range(2000):
        name, data = list(made.items())[number % len(made)]
        (root / f"{number:04}-{name}").write_bytes(mutated(data, rng))
    before, began = contents(root), time.monotonic()
    result = surveyed(root, instance_prompt="x")
    assert time.monotonic() - began < 120
    names = [picture.name for picture in result.pictures] + [fault.name for fault in result.unreadable]
    assert sorted(names) == sorted(before)
    assert 200 < len(result.pictures) < 1800
    assert all(len(str(fault)) < 200 and "\n" not in str(fault) for fault in result.unreadable)
    assert contents(root) == before
    libtiff = ("TIFF", "tempfile.tif", "LZW", "Fax")  # a C library that speaks for itself
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "looking" not in line]
    assert not [line for line in lines if not line.startswith(libtiff)]


def test_duplicates_are_found_by_their_bytes(tmp_path):
    (data, _), (other, _) = list(some_pictures(2).values())
    as_jsonl(tmp_path, {"a.png": (data, "one"), "b.png": (other, "two"), "c.png": (data, "three")})
    result = surveyed(tmp_path)
    assert result.refusal() is None
    assert result.duplicates == {hashlib.sha256(data).hexdigest(): ["a.png", "c.png"]}


def test_what_decoding_said_is_remembered_by_identity(broken, tmp_path, monkeypatch):
    """The second look decodes nothing but what is new; a picture that was edited is new."""
    memo, decoded = tmp_path / "memo.jsonl", []
    original = module.decode
    monkeypatch.setattr(module, "decode", lambda data, *rest: decoded.append(data) or original(data, *rest))
    first = surveyed(broken, memo=memo)
    assert len(decoded) == 8
    decoded.clear()
    again = surveyed(broken, memo=memo)
    assert not decoded
    assert [(p.id, p.facts, p.captions) for p in again.pictures] == [
        (p.id, p.facts, p.captions) for p in first.pictures
    ]
    assert again.unreadable == first.unreadable
    Image.new("RGB", (32, 20)).save(broken / "b.png")
    mended = surveyed(broken, memo=memo)
    assert decoded == [(broken / "b.png").read_bytes()]
    assert {p.name: p.facts.size for p in mended.pictures}["b.png"] == (20, 32)
    decoded.clear()
    surveyed(broken, memo=memo, max_pixels=10_000)
    assert len(decoded) == 8  # by other rules
    memo.write_text(memo.read_text()[:-20])
    assert surveyed(broken, memo=memo).unreadable == mended.unreadable


def test_a_memo_that_was_changed_is_not_believed(broken, tmp_path):
    """Neither cut, nor edited, nor of other types."""
    memo = tmp_path / "memo.jsonl"
    first = surveyed(broken, memo=memo)
    whole = memo.read_text()
    for damaged in (
        whole.replace("[64, 64]", "[64, 128]").replace('"size": [', '"size": [9'),
        "\n".join(whole.splitlines()[:4]),
        whole + "5\n",
        "[]\n5\n",
        "[" * 100_000,
    ):
        memo.write_text(damaged)
        again = surveyed(broken, memo=memo)
        assert [picture.facts for picture in again.pictures] == [picture.facts for picture in first.pictures]
        assert again.unreadable == first.unreadable
        assert memo.read_text() == whole


def test_a_machine_without_memory_says_so(broken, tmp_path, monkeypatch):
    """It is no fault of the picture, and nothing of it is remembered."""
    memo, original = tmp_path / "memo.jsonl", module.decode

    def exhausted(data, *rest):
        if data.startswith(b"\xff\xd8"):
            raise MemoryError
        return original(data, *rest)

    monkeypatch.setattr(module, "decode", exhausted)
    with pytest.raises(ResourceError, match=r"out of memory while decoding \S+\.jpg"):
        surveyed(broken, memo=memo)
    assert not memo.exists()


def test_names_do_not_order_the_set(tmp_path):
    """Not even of the same bytes with other captions."""
    (data, _), *_ = some_pictures(1).values()
    for folder, names in (("one", "ab"), ("other", "ba")):
        as_jsonl(tmp_path / folder, {f"{names[0]}.png": (data, "first"), f"{names[1]}.png": (data, "second")})
    one, other = (surveyed(tmp_path / folder) for folder in ("one", "other"))
    assert [p.captions for p in one.pictures] == [p.captions for p in other.pictures]


def test_a_survey_is_retold(broken):
    result = surveyed(broken)
    again = from_values(result.listing, json.loads(json.dumps(as_values(result))))
    assert [(p.id, p.name, p.facts, p.captions, p.repeats) for p in again.pictures] == [
        (p.id, p.name, p.facts, p.captions, p.repeats) for p in result.pictures
    ]
    assert again.quarantined == result.quarantined
    assert again.refusal() == result.refusal()
