"""Tables on this machine, opened by `datasets` once we know that all they name lies in their folder.

A saved set names its .arrow files in state.json, a folder of .parquet files may name them in README.md, and `datasets`
would follow any path or address there. So we resolve the names first, and hand over files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data.inside import check_link, named_inside
from latentdiff.data.source import Options

_CARDS = ("README.md", ".huggingface.yaml")


def is_table(path: Path) -> bool:
    """Whether a path is a saved data set, a parquet file, or a folder of them."""
    if path.is_dir():
        return is_saved(path) or any(path.rglob("*.parquet"))
    return path.suffix == ".parquet" and path.is_file()


def is_saved(path: Path) -> bool:
    """Whether `datasets` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def open_table(path: Path, options: Options) -> Any:
    """A split as a datasets.Dataset, or an IterableDataset to stream. Raises DataError, ConfigError."""
    from datasets import load_dataset

    if is_saved(path):
        table = _saved(path, options)
        return table.to_iterable_dataset() if options.streaming else table
    splits = {"train": [path]} if path.is_file() else _parquet_files(path, options)
    if options.split not in splits:
        raise ConfigError(f'{path} has no split "{options.split}". Its splits: {", ".join(splits)}')
    files = {name: [str(file) for file in own] for name, own in splits.items()}
    with _uncounted():
        return load_dataset("parquet", data_files=files, split=options.split, streaming=options.streaming)


@contextmanager
def _uncounted() -> Iterator[None]:
    """A block in which `datasets` does not tell the hub that its reader for .parquet was used."""
    from datasets import config

    before, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _saved(path: Path, options: Options) -> Any:
    from datasets import Dataset, DatasetInfo, concatenate_datasets

    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise DataError(f"dataset_dict.json has no list of splits ({path})")
        if options.split not in splits:
            raise ConfigError(f'{path} has no split "{options.split}". Its splits: {", ".join(splits)}')
        path = path / named_inside(PurePosixPath(), options.split, "dataset_dict.json")
    state = _json(path / "state.json")  # we ignore its format, in which `datasets` would show the rows
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"state.json has no list of data files ({path})")
    files = [path / named_inside(PurePosixPath(), entry.get("filename"), "state.json") for entry in entries]
    for file in files:
        check_link(file, path, options.follow_links)
    info, split = DatasetInfo.from_directory(str(path)), state.get("_split")
    parts = [Dataset.from_file(str(file), info=info, split=split) for file in files]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts, info=info, split=split)


def _json(path: Path) -> dict[str, Any]:
    import json

    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} is not a JSON object")
    return tree


def _parquet_files(folder: Path, options: Options) -> Mapping[str, list[Path]]:
    """The files of each split: as the folder's card names them, or by their own names as `datasets` has it."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    named = _named_in_cards(folder)
    if named is not None:
        for pattern in _texts(named):
            named_inside(PurePosixPath(), pattern, "README.md")
            if ":" in pattern:  # an address, or a file in an archive
                raise DataError(f"README.md names files outside its folder ({pattern})")
    base = str(folder.resolve())
    patterns = get_data_patterns(base) if named is None else sanitize_patterns(named)
    resolved = DataFilesDict.from_patterns(patterns, base, allowed_extensions=[".parquet"])
    splits = {str(split): [Path(file) for file in files] for split, files in resolved.items() if files}
    for file in (file for files in splits.values() for file in files):
        check_link(file, Path(base), options.follow_links)
    return splits


def _named_in_cards(folder: Path) -> Any:
    """`data_files` of the default configuration in the folder's cards, or None."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    data: dict[str, Any] = {}
    for name in _CARDS:
        data |= _card(folder / name) if (folder / name).is_file() else {}
    configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**data))
    if not configs:
        return None
    default = configs.get_default_config_name()
    if default is None:
        raise DataError(f"{folder} has several configurations and no default: {', '.join(configs)}")
    config = configs[default]
    if "data_files" not in config and "data_dir" in config:
        return f"{named_inside(PurePosixPath(), config['data_dir'], 'README.md')}/**"
    return config.get("data_files")


def _card(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        _, head, *_ = [*text.split("---", 2), ""] if text.startswith("---") else ["", "", ""]
        text = head
    tree = yaml.safe_load(text) or {}
    if not isinstance(tree, dict):
        raise DataError(f"{path.name} does not begin with settings ({path})")
    return {key: value for key, value in tree.items() if key == "configs"}


def _texts(tree: Any) -> Iterator[str]:
    """Every path in `data_files`; the names of splits are not paths."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _texts([value for key, value in tree.items() if key != "split"])
    elif isinstance(tree, Iterable):
        for value in tree:
            yield from _texts(value)
