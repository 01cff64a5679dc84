"""Models by hub id: fetched once, at one revision, and only what is read. The one place that may use the network."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READ = ("*.json", "*/*.json", "*/merges.txt")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def is_hub_id(name: str) -> bool:
    """Whether `owner/name` can be a model of the hub: no path that is there, nor one in a folder that is."""
    return _ID.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.exists()


def fetched(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a model of the hub in the user's cache, downloaded where it is not there yet.

    revision: a commit, tag or branch. What the cache holds of it is used without asking the hub; without a revision any
    cached state of the main branch. Raises ModelError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    named = f".{variant}" if variant else ""
    settings: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": [*_READ, *(f"{part}/*{named}*.safetensors" for part in _PARTS)],
        "ignore_patterns": [] if variant else ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*"],
    }
    try:
        return _whole(Path(snapshot_download(**settings, local_files_only=True)), named)
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):  # the last for names that no model can have
        pass
    try:
        return Path(str(snapshot_download(**settings)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ModelError(f"cannot fetch {name}{f' at {revision}' if revision else ''} from the hub: {reason}") from None


def _whole(folder: Path, named: str) -> Path:
    """A snapshot whose download was not cut off: its networks have weights. Raises FileNotFoundError."""
    for part in ("unet", "text_encoder"):
        if not any(named in file.name for file in (folder / part).glob("*.safetensors")):
            raise FileNotFoundError(part)
    return folder
