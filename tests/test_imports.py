"""What each command imports: every heavy library costs seconds of its start."""

import os
import subprocess
import sys

import pytest

from latentdiff.cli import main
from latentdiff.families.loading import DEFAULT_MODEL

from .conftest import ROOT

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "open_clip",
    "peft",
    "accelerate",
    "datasets",
    "scipy",
    "huggingface_hub",
)
COSTLY = (*HEAVY, "openvino", "tokenizers", "numpy", "PIL", "tqdm", "tensorboard")
CODE = """
import sys
from latentdiff.cli import main
sys.argv = ["latentdiff", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    print("code:", stop.code or 0)
print("imported:", *sorted({costly} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a drawn picture in it."""
    folder = tmp_path_factory.mktemp("imports")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.chdir(folder)
        patched.setattr(
            sys,
            "argv",
            ["latentdiff", *["generate", "ring", "-s", "1", "--steps", "1", "--device", "cpu", "-o", "ring.png"]],
        )
        main()
    return folder


DRAWING = {"openvino", "tokenizers", "numpy", "PIL"}


@pytest.mark.parametrize(
    ("words", "code", "imported"),
    [
        ("--help", 0, set()),
        ("generate --help", 0, set()),
        ("train --help", 0, set()),
        ("finetune --help", 0, set()),
        ("generate ring --steps 0", 2, {"numpy"}),
        ("train nothing.toml", 2, set()),
        ("runs ring.png", 2, set()),
        ("info ring.png", 0, {"numpy", "PIL"}),
        (f"info {DEFAULT_MODEL}", 0, {"numpy", "PIL"}),
        ("generate ring --steps 1 --device cpu", 0, DRAWING),
        ("generate ring --steps 1 --device cpu -i ring.png --mask ring.png", 0, DRAWING),
        ("reproduce ring.png --device cpu", 0, DRAWING),
        ("generate ring --runtime openvino --set pag_scale=1", 2, DRAWING),
    ],
)
def test_what_a_command_imports(folder, words, code, imported):
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("{costly}", repr(set(COSTLY))), *words.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    *_, ended, result = done.stdout.splitlines()
    assert ended == f"code: {code}", done.stderr
    assert set(result.split()[1:]) <= imported
