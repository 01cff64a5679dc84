"""Networks written to folders in diffusers' layout, readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentdiff.core.files import let_others_read
from latentdiff.networks.quiet import quietly


def save_network(network: Any, directory: Path) -> None:
    """Write config.json and safetensors weights. The config does not contain the path that the network came from."""
    with quietly():
        network.save_pretrained(directory, safe_serialization=True)
    let_others_read(directory)
    config = directory / "config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
