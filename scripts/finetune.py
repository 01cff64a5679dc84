"""`latentdiff finetune` under the flags of diffusers' training scripts, for command lines that are there already.

    python scripts/finetune.py --pretrained_model_name_or_path sd15 --train_data_dir pictures --output_dir out \
        --method lora --rank 16 --max_train_steps 2000 --learning_rate 1e-4 --snr_gamma 5 --random_flip

All of that command's own flags work too, with - and with _; kohya's names are among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from latentdiff.cli import main
from latentdiff.core.errors import ConfigError

MODEL = ("pretrained-model-name-or-path", "model")
DATA = ("train-data-dir", "instance-data-dir", "dataset-name", "data")
SWITCHES = {  # what is a key of the config here, or is done anyway
    "random-flip": ["--set", "data.pictures.flip=true"],
    "center-crop": ["--set", "data.pictures.crop=center"],
    "random-crop": ["--set", "data.pictures.crop=random", "--set", "finetune.cache=false"],
    "cache-latents": ["--set", "finetune.cache=true"],
    "use-ema": [],
    "with-prior-preservation": [],
}
VALUES = {
    "image-column": "data.pictures.image_column",
    "caption-column": "data.pictures.caption_column",
    "num-workers": "finetune.training.num_workers",
    "dataloader-num-workers": "finetune.training.num_workers",
    "adam-weight-decay": "finetune.training.weight_decay",
    "max-grad-norm": "finetune.training.max_grad_norm",
    "proportion-empty-prompts": "finetune.caption_dropout",
    "input-perturbation": "finetune.input_perturbation",
    "class-data-dir": "prior.source",
}


def translated(words: Sequence[str]) -> list[str]:
    """The words of `latentdiff finetune`. Raises ConfigError where model or data are not given."""
    result: list[str] = []
    places: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        flag, sign, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else ""
        if name in (*MODEL, *DATA):
            places["model" if name in MODEL else "data"] = value if sign else next(rest, "")
        elif name in SWITCHES:
            result += SWITCHES[name] if _is_on(flag, value) else []
        elif name in VALUES:
            result += ["--set", f"{VALUES[name]}={value if sign else next(rest, '')}"]
        else:
            result.append(word)
    if asks_for_help := {"-h", "--help"} & set(result):
        return ["finetune", *asks_for_help]
    if not (places.get("model") and places.get("data")):
        raise ConfigError("give --pretrained_model_name_or_path and --train_data_dir")
    return ["finetune", places["model"], places["data"], *result]


def _is_on(flag: str, value: str) -> bool:
    if value.lower() not in ("", "true", "1", "false", "0"):
        raise ConfigError(f"{flag} is true or false (got {value!r})")
    return value.lower() not in ("false", "0")


if __name__ == "__main__":
    try:
        sys.argv = ["latentdiff", *translated(sys.argv[1:])]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    main()
