"""Models by hub id: fetched once, at one revision, and only the files that are read.

No other module uses the internet.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.formats.folder import FEW_STEPS, GGUF, NETWORKS, read_json, weight_files

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_READ = ("*.json", "*/*.json", "*/merges.txt")
_OURS = ("words.txt", "clip/*.safetensors", f"{FEW_STEPS}/*.safetensors", *(f"{part}/{GGUF}" for part in NETWORKS))


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` of the hub: no file has that path, and no folder is called `owner`."""
    return _ID.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.exists()


def fetched(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a hub's model in the user's cache; it is downloaded if it is not there.

    revision: a commit, tag or branch, by default the main branch. A cached copy is used without a request to the hub,
    even if the main branch has changed since. Raises ModelError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    named = f".{variant}" if variant else ""
    settings: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": [*_READ, *_OURS, *(f"{part}/*{named}*.safetensors" for part in NETWORKS)],
        "ignore_patterns": [] if variant else ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.non_ema.*"],
    }
    try:
        return _complete(Path(snapshot_download(**settings, local_files_only=True)), variant)
    except (LocalEntryNotFoundError, ModelError, ValueError):  # the last for names that no model can have
        pass
    try:
        return Path(str(snapshot_download(**settings)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = textwrap.shorten(str(error).partition("An error happened")[0], 120, placeholder=" ...")
        wanted = f"{name}{f' at {revision}' if revision else ''}"
        raise ModelError(f"no folder {wanted} here, and it cannot be fetched from the hub: {reason}") from None


def _complete(folder: Path, variant: str | None) -> Path:
    """The snapshot, if its download was complete: every network of its index has its weights. Raises ModelError."""
    index = read_json(folder / "model_index.json")
    for part in NETWORKS:
        entry = index.get(part)
        if isinstance(entry, list) and entry[-1:] != [None]:
            weight_files(folder / part, variant)
    return folder
