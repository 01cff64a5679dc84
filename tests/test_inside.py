"""A data set reads nothing outside its folder: links, rows, and all that `datasets` would have followed."""

import json
import socket

import pytest

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data.source import Options
from latentdiff.evaluation.report.data_set import _duplicates

from .pictures import as_dataset, as_jsonl, as_parquet, as_shards, some_pictures, write_pictures
from .test_sources import surveyed

SECRET = "the secret"


@pytest.fixture
def pictures():
    return some_pictures(4)


@pytest.fixture
def outside(tmp_path, pictures):
    """A picture and a caption that are no business of the data set."""
    folder = tmp_path / "elsewhere"
    write_pictures(folder, {"secret.png": next(iter(pictures.values()))})
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""
    import datasets

    reached = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # even if nothing forbids the network
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: reached.append(a) or (_ for _ in ()).throw(OSError()))
    yield
    assert not reached


def test_links_out_of_a_folder(pictures, outside, tmp_path):
    root = tmp_path / "set"
    write_pictures(root, pictures)
    first = sorted(pictures)[0]
    (root / first).with_suffix(".txt").symlink_to(outside / "secret.txt")
    with pytest.raises(DataError, match=r"\.txt is a link out of the data set. Set data.pictures.follow_links=true"):
        surveyed(root, allow_missing_captions=True)
    followed = surveyed(root, Options(follow_links=True), allow_missing_captions=True)
    assert SECRET in {caption for picture in followed.pictures for caption in picture.captions}
    (root / first).with_suffix(".txt").unlink()
    for target in (outside, outside / "secret.png", "/etc"):
        link = root / "link.png"
        link.symlink_to(target)
        with pytest.raises(DataError, match=r"link.png is a link out of the data set"):
            surveyed(root, allow_missing_captions=True)
        link.unlink()
    (root / "inside.png").symlink_to(root / first)  # a link within is a file of the set
    (root / "broken.txt").symlink_to(root / "nowhere")
    assert len(surveyed(root, Options("uncaptioned"), allow_missing_captions=True).pictures) == 5


def test_links_to_shards_and_tables(pictures, tmp_path):
    shards, root = as_shards(tmp_path / "shards", pictures), tmp_path / "set"
    root.mkdir()
    (root / "00000.tar").symlink_to(next(shards.glob("*.tar")))
    with pytest.raises(DataError, match=r"00000.tar is a link out of the data set"):
        surveyed(root)
    assert surveyed(root, Options(follow_links=True)).pictures
    (root / "00000.tar").unlink()
    table = as_parquet(tmp_path / "table", pictures)
    (root / "train-00000.parquet").symlink_to(table / "train-00000.parquet")
    with pytest.raises(DataError, match="parquet is a link out of the data set"):
        surveyed(root)
    assert len(surveyed(root, Options(follow_links=True)).pictures) == 4


def parquet(path, cells, texts=None):
    """A parquet file of somebody else's: cells as they are, without the features of `datasets`."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": cells, "text": texts or ["a"] * len(cells)}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["struct", "string"])
def test_rows_that_name_files(form, streaming, pictures, outside, tmp_path, no_network):
    names = [
        str(outside / "secret.png"),
        "../elsewhere/secret.png",
        "sub/../../elsewhere/secret.png",
        "hf://datasets/a/b/x.png",
        "https://example.org/x.png",
        "file:///etc/passwd",
        "link.png",
        "\0",
    ]
    folder = tmp_path / "table"
    write_pictures(folder / "in", {"a.png": next(iter(pictures.values()))})
    (folder / "link.png").symlink_to(outside / "secret.png")
    cells = [{"bytes": None, "path": name} if form == "struct" else name for name in [*names, "in/a.png"]]
    parquet(folder / "train.parquet", cells)
    result = surveyed(folder, Options("table", streaming=streaming))
    assert [picture.name for picture in result.pictures] == [f"row {len(names)}"]  # the file in the folder
    assert len(result.unreadable) == len(names)


def test_columns_that_a_decoder_would_open(pictures, outside, tmp_path, no_network):
    """A caption column of pictures, whose decoder opens any path, is no caption column."""
    import datasets

    rows = {"image": [next(iter(pictures.values()))[0]], "text": [str(outside / "secret.png")]}
    table = datasets.Dataset.from_dict(rows).cast_column("text", datasets.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ConfigError, match=r"column text holds Image, not text. Use caption_column"):
        surveyed(tmp_path / "set")


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "s3://bucket/x.arrow", 7, None])
def test_saved_sets_that_name_files(name, pictures, tmp_path, no_network):
    as_dataset(tmp_path / "other", pictures)
    folder = as_dataset(tmp_path / "set", pictures)
    state = json.loads((folder / "state.json").read_text())
    if name == "/etc/passwd":
        name = str(tmp_path / "other" / state["_data_files"][0]["filename"])
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"names a file outside|has no file_name|cannot read"):
        surveyed(folder)


def test_saved_sets_of_odd_states(pictures, tmp_path):
    """The format in which `datasets` would give the rows does not matter: a custom one is code elsewhere."""
    folder = as_dataset(tmp_path / "set", pictures)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_format_type": "custom", "_format_kwargs": {"x": 1}}))
    assert len(surveyed(folder).pictures) == 4
    for odd in ([], "x", {"_data_files": 5}, {"_data_files": []}, {"_data_files": ["x"]}):
        (folder / "state.json").write_text(json.dumps(odd))
        with pytest.raises(DataError, match=r"state\.json|no data set|_data_files"):
            surveyed(folder)
    for splits in (5, ["../set"], [1]):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        with pytest.raises((DataError, ConfigError), match=r"split|dataset_dict\.json"):
            surveyed(folder, Options(split="../set"))


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "files",
    [
        "/OUTSIDE/train.parquet",
        "../elsewhere/*.parquet",
        "hf://datasets/a/b/*.parquet",
        "https://example.org/x.parquet",
        "zip://x.parquet::https://example.org/x.zip",
        ["train.parquet", "../elsewhere/train.parquet"],
        [{"split": "train", "path": ["hf://datasets/a/b/x.parquet"]}],
    ],
)
def test_cards_that_name_files(card, files, outside, pictures, tmp_path, no_network):
    import yaml

    files = json.loads(json.dumps(files).replace("/OUTSIDE", str(outside)))
    cells = [{"bytes": content, "path": None} for content, *_ in pictures.values()]
    parquet(outside / "train.parquet", cells)
    parquet(tmp_path / "set" / "train.parquet", cells)
    text = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]})
    (tmp_path / "set" / card).write_text(text if card.endswith("yaml") else f"---\n{text}---\n# a set\n")
    with pytest.raises(DataError, match=r"names (a file|files) outside"):
        surveyed(tmp_path / "set")


def test_a_card_that_names_its_own_files(pictures, tmp_path):
    cells = [{"bytes": content, "path": None} for content, *_ in pictures.values()]
    parquet(tmp_path / "one" / "x.parquet", cells[:3])
    parquet(tmp_path / "two" / "y.parquet", cells[3:])
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: one/*.parquet\n  - split: test\n    path: two/*\n---\n"
    )
    assert len(surveyed(tmp_path).pictures) == 3
    assert len(surveyed(tmp_path, Options(split="test")).pictures) == 1
    with pytest.raises(ConfigError, match=r'no split "dev". Its splits: train, test'):
        surveyed(tmp_path, Options(split="dev"))


def test_splits_of_a_folder(pictures, tmp_path):
    """`train` and `test` beside each other are not one set."""
    names = sorted(pictures)
    as_jsonl(tmp_path / "train", {name: pictures[name] for name in names[:3]})
    as_jsonl(tmp_path / "test", {names[3]: pictures[names[3]]})
    result = surveyed(tmp_path)
    assert sorted(picture.name for picture in result.pictures) == [f"train/{name}" for name in names[:3]]
    assert "other splits are not read: test" in result.listing.notes
    assert [p.name for p in surveyed(tmp_path, Options(split="test")).pictures] == [f"test/{names[3]}"]
    with pytest.raises(ConfigError, match=r'no split "dev". Its splits: test, train'):
        surveyed(tmp_path, Options(split="dev"))
    (tmp_path / "test").rename(tmp_path / "more")  # no split's name: one set
    assert len(surveyed(tmp_path).pictures) == 4


@pytest.mark.parametrize("name", [".", "./", "a/..", "train/.."])
def test_rows_that_name_the_folder_itself(name, pictures, tmp_path):
    """They are rows without a picture."""
    as_jsonl(tmp_path, pictures)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": "x"}) + "\n")
    assert surveyed(tmp_path).listing.orphans == (f"{name} (metadata.jsonl line 5)",)


def test_rows_above_splits(pictures, tmp_path):
    """Rows of another split are not missing pictures."""
    names = sorted(pictures)
    rows = []
    for number, name in enumerate(names):
        split = "val" if number == 3 else "train"
        write_pictures(tmp_path / split, {name: pictures[name]})
        rows.append({"file_name": f"{split}/{name}", "text": name})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = surveyed(tmp_path)
    assert len(result.pictures) == 3
    assert not result.listing.orphans


def test_many_equal_pictures_are_a_short_line(pictures, tmp_path):
    write_pictures(tmp_path, {f"{i:03}.png": next(iter(pictures.values())) for i in range(40)})
    entry = _duplicates(surveyed(tmp_path, allow_missing_captions=True))
    assert entry.text == "40 images in 1 group of the same bytes"
    assert len(entry.lines) == 1
    assert entry.lines[0].endswith(" more")
    assert len(entry.lines[0]) < 200
