"""Write the scenes of a config as a folder of pictures with captions, for fine-tuning, distillation or other programs.

    python scripts/compose.py configs/emoji-128.toml SCENES --pictures 12000 [--set data.sprites.source=SPRITES]
    latentdiff finetune emoji-128 SCENES -o ECT --method consistency --set consistency.objective=ect

Every picture is written with all its captions, from the full one to the bare noun: training takes one at random.
"""

import argparse
import json
from pathlib import Path

from latentdiff.core.errors import ConfigError
from latentdiff.core.images import as_picture
from latentdiff.data.dataset import open_data
from latentdiff.settings.config import load_config


def write(config: Path, folder: Path, pictures: int, overrides: list[str]) -> None:
    """Write `pictures` scenes and metadata.jsonl. Raises ConfigError, DataError."""
    settings = load_config(config, [*overrides, f"data.count={pictures}"])
    if not settings.data.is_procedural:
        raise ConfigError(f"{config} has pictures of its own: nothing is to be composed")
    examples = open_data(settings).training
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for row in range(len(examples)):
            name = f"{row:06}.png"
            as_picture(examples.image(row, 0)).save(folder / name)
            lines.write(json.dumps({"file_name": name, "text": list(examples.pictures.captions(row))}) + "\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    write(arguments.config, arguments.folder, arguments.pictures, arguments.overrides)


if __name__ == "__main__":
    main()
