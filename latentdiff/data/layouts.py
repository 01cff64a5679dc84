"""The layout of a data set, recognised from its files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data import folder, local_table, shards, table
from latentdiff.data.source import Listing, Options


def find(source: str, options: Options) -> Listing:
    """List a data set at a path, in shards `name-{00000..00099}.tar`, or under a hub id.

    Raises DataError, ConfigError.
    """
    try:
        return _local(source, Path(source), options)
    except OSError as error:
        raise DataError(f"cannot read {source} ({(error.strerror or str(error)).lower()})") from None


def _local(source: str, path: Path, options: Options) -> Listing:
    if options.layout == "uncaptioned" and path.name in folder.METADATA and path.is_file():
        path = path.parent
    if options.layout == "uncaptioned" and not (path.is_dir() and folder.has_pictures(path)):
        return _without_captions(_local(source, path, replace(options, layout="auto")))
    layout, sharded, tabled = options.layout, shards.is_sharded(source), local_table.is_table(path)
    if layout == "auto" and path.is_dir() and (sharded or tabled) and folder.has_pictures(path):
        other, name = (".tar files", "shards") if sharded else (".parquet files or a saved data set", "table")
        advice = f"Set data.pictures.layout to metadata, sidecars, uncaptioned or {name}"
        raise ConfigError(f"{source} holds pictures and {other}. {advice}")
    if layout == "shards" or (layout == "auto" and sharded):
        return shards.listing(source, options)
    if layout == "table" or (layout == "auto" and tabled):
        return table.listing(source, options)
    if path.name in folder.METADATA and path.is_file():
        path = path.parent
    if path.is_dir():
        return folder.listing(path, options)
    if path.exists():
        raise DataError(f"{source} is not a data set. Give a folder, .tar shards, .parquet files or a hub id")
    if layout == "auto" and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not path.parent.is_dir():
        return table.listing(source, options)
    raise DataError(f"no such data set ({source}). Give a folder, .tar shards, .parquet files or a hub id")


def _without_captions(listing: Listing) -> Listing:
    """The pictures of shards or a table alone. Raises ConfigError for a stream."""
    if listing.streamed:
        raise ConfigError("data.pictures.layout = uncaptioned requires data that is not streamed")
    records = [replace(record, captions=(), fault="") for record in listing.records]  # a fault is one of captions
    return replace(listing, records=records, orphans=())
