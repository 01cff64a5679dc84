"""Every layout gives the same pictures and captions; what does not fit together is named, never dropped."""

import hashlib
import io
import json
import re
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data.buckets import bucket_table
from latentdiff.data.layouts import find
from latentdiff.data.pictures import PictureSet, View
from latentdiff.data.source import Options
from latentdiff.data.survey import survey

from .pictures import (
    LAYOUTS,
    as_csv,
    as_dataset,
    as_jsonl,
    as_parquet,
    as_shards,
    as_sidecars,
    some_pictures,
    write_pictures,
)


@pytest.fixture(scope="module")
def pictures():
    return some_pictures()


def surveyed(source, options=None, **more):
    return survey(find(str(source), options or Options()), **more)


def refusal(source, options=None, **more):
    result = surveyed(source, options, **more)
    assert result.count == len(result.pictures) + len(result.quarantined)
    return result.refusal()


def as_set(result, side=32):
    return PictureSet(result.pictures, bucket_table(side, 8))


@pytest.fixture(scope="module")
def expected(pictures, tmp_path_factory):
    """Identities in order, names' captions, and pixels, from the files themselves."""
    rows = sorted((hashlib.sha256(data).hexdigest(), caption) for data, caption in pictures.values())
    pixels = as_set(surveyed(as_jsonl(tmp_path_factory.mktemp("expected"), pictures)))
    return rows, [pixels.pixels(row, View()) for row in range(len(pixels))], pixels.identity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_same_set(layout, pictures, expected, tmp_path):
    """The same identities, captions, pixels and identity of the whole, in the same order."""
    result = surveyed(LAYOUTS[layout](tmp_path / "set", pictures))
    assert result.refusal() is None
    rows, pixels, identity = expected
    assert [(picture.id, *picture.captions) for picture in result.pictures] == rows
    read = as_set(result)
    assert all(np.array_equal(read.pixels(row, View()), pixels[row]) for row in range(50))
    assert read.identity() == identity


def test_a_folder_without_captions(pictures, expected, tmp_path):
    write_pictures(tmp_path / "set", pictures)
    assert refusal(tmp_path / "set") == (
        "50 images have no caption: 000.png, 001.jpg, 002.webp, 003.png, 004.jpg, ... (45 more). "
        "Add rows or pass --allow-missing-captions"
    )
    result = surveyed(tmp_path / "set", instance_prompt="a photo of sks dog")
    assert [picture.id for picture in result.pictures] == [key for key, _ in expected[0]]
    assert {picture.captions for picture in result.pictures} == {("a photo of sks dog",)}
    allowed = surveyed(tmp_path / "set", allow_missing_captions=True)
    assert {picture.captions for picture in allowed.pictures} == {("",)}


@pytest.mark.parametrize("kind", [as_shards, as_parquet, as_dataset])
def test_captions_that_are_ignored(kind, pictures, expected, tmp_path):
    """Whatever the pictures lie in."""
    source = kind(tmp_path / "set", pictures)
    result = surveyed(source, Options(layout="uncaptioned"), instance_prompt="a <dog>")
    assert [picture.id for picture in result.pictures] == [key for key, _ in expected[0]]
    assert {picture.captions for picture in result.pictures} == {("a <dog>",)}
    if kind is as_shards:
        with tarfile.open(sorted(source.glob("*.tar"))[0] if source.is_dir() else source, "a") as archive:
            lone = tarfile.TarInfo("lone.txt")
            lone.size = 1
            archive.addfile(lone, io.BytesIO(b"x"))
        assert refusal(source, Options(layout="uncaptioned"), instance_prompt="a <dog>") is None, "nor lone captions"
    if kind is as_parquet:
        with pytest.raises(ConfigError, match="uncaptioned requires data that is not streamed"):
            surveyed(source, Options(layout="uncaptioned", streaming=True))


def test_captions_that_a_file_of_rows_would_give(pictures, tmp_path):
    """A folder that is named by its metadata, of which only the pictures are wanted: also those without a row."""
    folder = as_jsonl(tmp_path / "set", dict(list(pictures.items())[:3]))
    (folder / "more.png").write_bytes(pictures["003.png"][0])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n')
    result = surveyed(folder / "metadata.jsonl", Options(layout="uncaptioned"), instance_prompt="a <dog>")
    assert (len(result.pictures), result.refusal()) == (4, None)


def test_streamed_tables(pictures, expected, tmp_path):
    """In their own order, never whole in memory; pictures as the same bytes."""
    folder = as_parquet(tmp_path / "set", pictures)
    result = surveyed(folder, Options(streaming=True))
    rows, pixels, identity = expected
    assert result.listing.streamed
    assert [(picture.id, *picture.captions) for picture in result.pictures] == rows
    streamed = PictureSet(result.pictures, bucket_table(32, 8), stream=result.listing.records)
    wanted = [(row, View(flipped=flipped)) for row in (7, 3, 40) for flipped in (False, True)]
    visible = dict(streamed.each(wanted))
    for number, (row, view) in enumerate(wanted):
        assert np.array_equal(visible[number], pixels[row][:, ::-1] if view.flipped else pixels[row])
    with pytest.raises(DataError, match="read in its own order only"):
        streamed.pixels(0, View())
    assert streamed.identity() == identity


def test_repeats_of_kohya(pictures, tmp_path):
    """`3_dogs` counts three times an epoch; without sidecars the folder's words are the caption."""
    as_sidecars(tmp_path / "set", dict(list(pictures.items())[:2]))
    (tmp_path / "set" / "1_things").rename(tmp_path / "set" / "3_dogs")
    result = surveyed(tmp_path / "set")
    assert [picture.repeats for picture in result.pictures] == [3, 3]
    assert len(as_set(result)) == 6
    write_pictures(tmp_path / "bare" / "2_a sks dog", pictures)
    bare = surveyed(tmp_path / "bare")
    assert {(picture.captions, picture.repeats) for picture in bare.pictures} == {(("a sks dog",), 2)}


def test_several_captions(pictures, tmp_path):
    one = dict(list(pictures.items())[:1])
    (name,) = one
    as_sidecars(tmp_path / "lines", one)
    (tmp_path / "lines" / "1_things" / name).with_suffix(".txt").write_text("first\n\n second \n")
    assert surveyed(tmp_path / "lines").pictures[0].captions == ("first", "second")
    as_jsonl(tmp_path / "list", one)
    (tmp_path / "list" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": ["first", "second"]}))
    assert surveyed(tmp_path / "list").pictures[0].captions == ("first", "second")


@pytest.mark.parametrize("key", ["text", "caption", "prompt", "words"])
def test_caption_columns(key, pictures, tmp_path):
    one = dict(list(pictures.items())[:1])
    (name,) = one
    as_jsonl(tmp_path, one)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, key: "said"}))
    options = Options(caption_column=key if key == "words" else None)
    assert surveyed(tmp_path, options).pictures[0].captions == ("said",)
    with pytest.raises(ConfigError, match=rf'no column "other". Its columns: file_name, {key}'):
        surveyed(tmp_path, Options(caption_column="other"))


def test_columns_and_splits_of_tables(pictures, tmp_path):
    folder = as_dataset(tmp_path / "set", pictures)
    with pytest.raises(ConfigError, match=r'no column "img". Its columns: image, text. Name one with image_column'):
        surveyed(folder, Options(image_column="img"))
    with pytest.raises(ConfigError, match=r'no column "title". Its columns: image, text'):
        surveyed(folder, Options(caption_column="title"))
    import datasets

    datasets.DatasetDict({"test": datasets.load_from_disk(str(folder))}).save_to_disk(tmp_path / "dict")
    with pytest.raises(ConfigError, match=r'no split "train". Its splits: test'):
        surveyed(tmp_path / "dict")
    assert len(surveyed(tmp_path / "dict", Options(split="test")).pictures) == 50


def test_metadata_below_and_pictures_not_in_it(pictures, tmp_path):
    """Each metadata file speaks of its own folder; Hugging Face's loader would drop the picture without a row."""
    names = list(pictures)
    as_jsonl(tmp_path / "a", {name: pictures[name] for name in names[:3]})
    as_csv(tmp_path / "b" / "c", {name: pictures[name] for name in names[3:5]})
    assert len(surveyed(tmp_path).pictures) == 5
    write_pictures(tmp_path / "b", {names[5]: pictures[names[5]]})
    assert refusal(tmp_path).startswith(f"1 image has no caption: b/{names[5]}. Add rows or pass")


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv", "sidecars"])
@pytest.mark.parametrize("text", ["", "  "])
def test_empty_captions_are_missing_ones(layout, text, pictures, tmp_path):
    some = {name: (data, text if number in (1, 2) else caption)
            for number, (name, (data, caption)) in enumerate(list(pictures.items())[:5])}  # fmt: skip
    LAYOUTS[layout](tmp_path / "set", some)
    assert re.match(r"2 images have no caption: \S*001.jpg, \S*002.webp\. Add rows or pass", refusal(tmp_path / "set"))


def test_null_captions_are_missing_ones(pictures, tmp_path):
    as_jsonl(tmp_path, {"a.png": pictures["000.png"]})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}\n')
    assert refusal(tmp_path).startswith("1 image has no caption: a.png")


def test_captions_without_a_picture(pictures, tmp_path):
    some = dict(list(pictures.items())[:3])
    as_jsonl(tmp_path / "rows", some)
    with (tmp_path / "rows" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n')
    assert refusal(tmp_path / "rows") == (
        "1 caption has no image: gone.png (metadata.jsonl line 4). Mend them or pass --skip-bad"
    )
    as_sidecars(tmp_path / "beside", some)
    (tmp_path / "beside" / "1_things" / "gone.txt").write_text("x")
    assert refusal(tmp_path / "beside").startswith("1 caption has no image: 1_things/gone.txt.")
    as_shards(tmp_path / "tar", some)
    with tarfile.open(tmp_path / "tar" / "00000.tar", "a") as archive:
        archive.add(tmp_path / "beside" / "1_things" / "gone.txt", "gone.txt")
    assert refusal(tmp_path / "tar").startswith("1 caption has no image: 00000.tar/gone.txt.")


def test_the_advice_fits_every_fault(pictures, tmp_path):
    """A flag that allows missing captions would not help a caption without a picture."""
    as_jsonl(tmp_path, dict(list(pictures.items())[:3]))
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n')
    (tmp_path / "bare.png").write_bytes(pictures["000.png"][0])
    assert refusal(tmp_path) == (
        "1 image has no caption: bare.png; 1 caption has no image: gone.png (metadata.jsonl line 4). "
        "Mend them or pass --skip-bad"
    )


def test_an_instance_prompt_goes_before_a_folder_s_words(pictures, tmp_path):
    for folder in ("10_a dog", "plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "10_a dog" / "a.png").write_bytes(pictures["000.png"][0])
    (tmp_path / "plain" / "b.jpg").write_bytes(pictures["001.jpg"][0])

    def captions(instance_prompt):
        result = surveyed(tmp_path, allow_missing_captions=True, instance_prompt=instance_prompt)
        return {picture.name: (picture.captions, picture.repeats) for picture in result.pictures}

    assert captions(None) == {"10_a dog/a.png": (("a dog",), 10), "plain/b.jpg": (("",), 1)}
    assert captions("<pet>") == {"10_a dog/a.png": (("<pet>",), 10), "plain/b.jpg": (("<pet>",), 1)}


def test_two_rows_for_one_picture(pictures, tmp_path):
    as_jsonl(tmp_path, dict(list(pictures.items())[:3]))
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "001.jpg", "text": "another"}\n')
    message = "that are ambiguous: 001.jpg (2 rows: metadata.jsonl line 2 and metadata.jsonl line 4)"
    assert message in refusal(tmp_path)


def test_one_stem_two_pictures(pictures, tmp_path):
    """With rows of their own they are two pictures; one sidecar cannot be both's, nor one key of a shard."""
    both = {"a.png": (pictures["000.png"][0], "a png"), "a.jpg": (pictures["001.jpg"][0], "a jpeg")}
    as_jsonl(tmp_path / "rows", both)
    result = surveyed(tmp_path / "rows")
    assert sorted(picture.captions[0] for picture in result.pictures) == ["a jpeg", "a png"]
    rows = as_set(result)
    assert rows.key(0, View()) != rows.key(1, View())
    as_sidecars(tmp_path / "beside", both)
    assert refusal(tmp_path / "beside").startswith(
        "2 images have captions that are ambiguous: 1_things/a.jpg (shares 1_things/a.txt with 1_things/a.png), "
    )
    shard = tmp_path / "one.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted((tmp_path / "beside" / "1_things").iterdir()):
            archive.add(path, path.name)
    assert refusal(shard).startswith("2 images have captions that are ambiguous: one.tar/a.jpg (2 pictures of one")


NAMES = [
    unicodedata.normalize("NFC", "café.png"),
    unicodedata.normalize("NFD", "naïve.png"),
    "two words.png",
    "😀🏳️‍🌈.png",
    "-n.png",
    "line\nbreak.png",
    "ä" * 125 + ".png",
    "a'b\"c$(d).png",
]


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv", "sidecars", "shards"])
def test_names(layout, tmp_path):
    """Whatever a file system allows is matched with its caption."""
    some = {name: (data, f"caption {number}") for number, (name, (data, _)) in
            enumerate(zip(NAMES, some_pictures(len(NAMES)).values(), strict=True))}  # fmt: skip
    LAYOUTS[layout](tmp_path / "set", some)
    result = surveyed(tmp_path / "set")
    assert result.refusal() is None
    captions = {hashlib.sha256(data).hexdigest(): caption for data, caption in some.values()}
    assert {picture.id: picture.captions[0] for picture in result.pictures} == captions


@pytest.mark.parametrize(("on_disk", "in_metadata"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_either_unicode_form_is_matched(on_disk, in_metadata, tmp_path):
    ((data, _),) = some_pictures(1).values()
    write_pictures(tmp_path, {unicodedata.normalize(on_disk, "é.png"): (data, "")})
    row = {"file_name": unicodedata.normalize(in_metadata, "é.png"), "text": "one"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert [picture.captions for picture in surveyed(tmp_path).pictures] == [("one",)]


def test_the_other_unicode_form_is_matched(tmp_path):
    """macOS writes NFD, an editor NFC; but two files that differ in nothing else are told apart by their bytes."""
    (data, _), (other, _) = list(some_pictures(2).values())
    nfc, nfd = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    write_pictures(tmp_path, {nfd: (data, "")})
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": nfc, "text": "one"}) + "\n")
    assert [picture.captions for picture in surveyed(tmp_path).pictures] == [("one",)]
    write_pictures(tmp_path, {nfc: (other, "")})
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": nfd, "text": "two"}) + "\n")
    captions = {picture.name: picture.captions[0] for picture in surveyed(tmp_path).pictures}
    assert captions == {nfc: "one", nfd: "two"}


@pytest.mark.parametrize("layout", ["metadata.jsonl", "sidecars"])
def test_byte_order_marks_and_long_captions(layout, pictures, tmp_path):
    long = "many words " * 10_000
    LAYOUTS[layout](tmp_path / "set", {"a.png": (pictures["000.png"][0], long)})
    (file,) = [path for path in (tmp_path / "set").rglob("*") if path.suffix in (".jsonl", ".txt")]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert surveyed(tmp_path / "set").pictures[0].captions == (long.strip(),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "a.png", "text": "caf\xe9"}', "metadata.jsonl line 7 is not valid UTF-8"),
        (b'{"file_name": "a.png", "text": "x"', "metadata.jsonl line 7 is not valid JSON"),
        (b'["a.png", "x"]', "metadata.jsonl line 7 is not a JSON object"),
        (b'{"text": "x"}', "metadata.jsonl line 7 has no file_name"),
        (
            b'{"file_name": "../a.png", "text": "x"}',
            r"metadata.jsonl line 7 names a file outside its folder \(../a.png\)",
        ),
        (b'{"file_name": "/etc/passwd", "text": "x"}', "metadata.jsonl line 7 names a file outside its folder"),
        (b'{"file_name": "a.png", "text": 3}', r"metadata.jsonl line 7: text must be a string or a list .*got 3"),
        (b'{"file_name": "a.png", "text": "\\ud800"}', "metadata.jsonl line 7: text contains half a surrogate pair"),
        (b'{"file_name": "a.png", "text": "x", "text": "y"}', "metadata.jsonl line 7 .* a key occurs twice"),
        (b"[" * 100_000, "metadata.jsonl line 7 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(line, message, pictures, tmp_path):
    as_jsonl(tmp_path, dict(list(pictures.items())[:6]))
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DataError, match=message):
        surveyed(tmp_path)


def test_bad_sidecars_and_tables_of_commas_are_named(pictures, tmp_path):
    as_sidecars(tmp_path / "beside", {"a.png": pictures["000.png"]})
    (tmp_path / "beside" / "1_things" / "a.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"^1_things/a.txt line 2 is not valid UTF-8"):
        surveyed(tmp_path / "beside")
    as_csv(tmp_path / "commas", dict(list(pictures.items())[:2]))
    doubled = (tmp_path / "commas" / "metadata.csv").read_text().replace("file_name,text", "file_name,text,text", 1)
    (tmp_path / "commas" / "metadata.csv").write_text(doubled)
    with pytest.raises(DataError, match=r"^metadata.csv has a column twice: file_name, text, text"):
        surveyed(tmp_path / "commas")
    as_csv(tmp_path / "commas", dict(list(pictures.items())[:2]))
    with (tmp_path / "commas" / "metadata.csv").open("a") as file:
        file.write("000.png,a,b\n")
    with pytest.raises(DataError, match=r"^metadata.csv line 4 has more fields than there are columns"):
        surveyed(tmp_path / "commas")


def test_shards_in_braces_and_what_is_no_shard(pictures, tmp_path):
    as_shards(tmp_path / "set", pictures)
    assert len(surveyed(tmp_path / "set" / "{00000..00002}.tar").pictures) == 50
    assert len(surveyed(tmp_path / "set" / "00001.tar").pictures) == 20
    with pytest.raises(DataError, match=r"no such shard .*00003.tar"):
        surveyed(tmp_path / "set" / "{00000..00003}.tar")
    with pytest.raises(ConfigError, match="must be files of this machine"):
        surveyed("pipe:curl http://example.org/000.tar")
    data = (tmp_path / "set" / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "set" / "00000.tar") as archive:
        last = archive.getmembers()[-1]
    for cut in (len(data) // 2, last.offset, last.offset + 100, last.offset_data + 3):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"cut.tar cannot be read: (unexpected end of data|cut off)"):
            surveyed(tmp_path / "cut.tar")
    (tmp_path / "not.tar").write_bytes(b"something else" * 100)
    with pytest.raises(DataError, match=r"not.tar cannot be read"):
        surveyed(tmp_path / "not.tar")


def test_json_members_of_shards(pictures, tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "one.tar")) as writer:
        writer.write({"__key__": "a/b.c", "png": pictures["000.png"][0], "json": {"caption": "told in JSON"}})
        writer.write({"__key__": "d", "jpg": pictures["001.jpg"][0], "json": {"width": 3}, "txt": "told in text"})
    result = surveyed(tmp_path / "one.tar")
    assert sorted(picture.captions for picture in result.pictures) == [("told in JSON",), ("told in text",)]


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no such data set \(.*nowhere\)"):
        surveyed(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no pictures in"):
        surveyed(tmp_path)
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is not a data set"):
        surveyed(tmp_path / "file.zip")


def test_nothing_is_read_twice_or_in_secret(pictures, tmp_path):
    """Links in a circle end; hidden files are no pictures; other files are counted."""
    as_jsonl(tmp_path / "set", dict(list(pictures.items())[:2]))
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "._000.png").write_bytes(b"\x00\x05\x16\x07 of a finder")
    (tmp_path / "set" / "notes.md").write_text("x")
    result = surveyed(tmp_path / "set")
    assert len(result.pictures) == 2
    assert result.listing.notes == ("2 other files are not read: ._000.png, notes.md",)


@pytest.mark.parametrize("stray", ["backup.tar", "rows.parquet"])
def test_two_layouts_in_one_folder_are_not_chosen_between(stray, pictures, tmp_path):
    """Else the pictures of one would be dropped."""
    as_jsonl(tmp_path / "set", dict(list(pictures.items())[:2]))
    if stray.endswith("tar"):
        as_shards(tmp_path / "other", pictures)
        (tmp_path / "other" / "00000.tar").rename(tmp_path / "set" / stray)
    else:
        as_parquet(tmp_path / "other", pictures)
        (tmp_path / "other" / "train-00000.parquet").rename(tmp_path / "set" / stray)
    with pytest.raises(ConfigError, match=r"holds pictures and \..* Set data.pictures.layout to metadata, "):
        surveyed(tmp_path / "set")
    assert len(surveyed(tmp_path / "set", Options("metadata")).pictures) == 2


def test_joined_archives_and_links_in_them(pictures, tmp_path):
    as_shards(tmp_path / "set", pictures)
    (joined := tmp_path / "joined.tar").write_bytes(
        b"".join((tmp_path / "set" / f"0000{number}.tar").read_bytes() for number in range(2))
    )
    with pytest.raises(DataError, match=r"more data follows its end at byte .*: archives must not be joined"):
        surveyed(joined)
    with tarfile.open(tmp_path / "set" / "00002.tar", "a") as archive:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "040.jpg"
        archive.addfile(link)
    message = r"1 of 51 images cannot be read: 00002.tar/linked.jpg \(a link or sparse file inside its archive\)"
    assert re.match(message, refusal(tmp_path / "set"))


def test_pipes_and_closed_folders(pictures, tmp_path, monkeypatch):
    """Neither waited for nor passed over."""
    import os

    as_jsonl(tmp_path / "set", dict(list(pictures.items())[:2]))
    os.mkfifo(tmp_path / "set" / "pipe.png")
    assert "pipe.png (not a file)" in surveyed(tmp_path / "set", allow_missing_captions=True).refusal()
    original = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    (tmp_path / "set" / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"closed cannot be read \(permission denied\)"):
        surveyed(tmp_path / "set")


def test_splits_of_parquet_folders(pictures, tmp_path):
    """The names of files give their split; files of other splits are named."""
    items = list(pictures.items())
    as_parquet(tmp_path / "set", dict(items[:20]))
    as_parquet(tmp_path / "more", dict(items[20:25]))
    (tmp_path / "more" / "train-00000.parquet").rename(tmp_path / "set" / "test-00000.parquet")
    train, test = (surveyed(tmp_path / "set", Options(split=split)) for split in ("train", "test"))
    assert (len(train.pictures), len(test.pictures)) == (20, 5)
    assert train.listing.notes == ("other splits are not read: test",)
    with pytest.raises(ConfigError, match=r'has no split "dev". Its splits: train, test'):
        surveyed(tmp_path / "set", Options(split="dev"))


def test_a_file_that_changes_meanwhile_is_noticed(pictures, tmp_path):
    as_jsonl(tmp_path, dict(list(pictures.items())[:2]))
    rows = as_set(surveyed(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "000.png")
    (row,) = (row for row in range(2) if rows.picture(row).name == "000.png")
    with pytest.raises(DataError, match=r"000.png changed after the survey"):
        rows.pixels(row, View())
