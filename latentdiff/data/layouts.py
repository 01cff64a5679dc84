"""Which layout a data set has, seen by looking at what is there."""

from __future__ import annotations

import re
from pathlib import Path

from latentdiff.data import folder, shards, table
from latentdiff.data.source import Listing, Options, shown
from latentdiff.errors import DataError


def find(source: str, options: Options) -> Listing:
    """List what is at a path, in shards `name-{00000..00099}.tar`, or under a hub id. Raises DataError, ConfigError."""
    layout, path = options.layout, Path(source)
    if layout == "shards" or (layout == "auto" and shards.is_sharded(source)):
        return shards.listing(source, options)
    if layout == "table" or (layout == "auto" and table.is_table(path)):
        return table.listing(source, options)
    if path.name in folder.METADATA and path.is_file():
        path = path.parent
    if path.is_dir():
        return folder.listing(path, options)
    if path.exists():
        raise DataError(f"{shown(source)} is no data set. Give a folder, .tar shards, .parquet files or a hub id")
    if layout == "auto" and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not path.parent.is_dir():
        return table.listing(source, options)
    raise DataError(f"no such data set ({shown(source)}). Give a folder, .tar shards, .parquet files or a hub id")
