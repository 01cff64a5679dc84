"""README and manual: every command of the README runs, every command of the manual is one that the program takes."""

import re
import shlex
import shutil

import numpy as np
import pytest
import typer
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from latentdiff.cli import app

from . import stable_diffusion
from .conftest import ROOT
from .pictures import as_jsonl, some_pictures

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = {  # what makes a command of the README quick; everything else of it is run as it stands
    "finetune": "--steps 2 --validation-pictures 2 --set previews.count=2 --set previews.num_inference_steps=2",
    "train": "--set autoencoder.training.max_train_steps=2 --set clip.training.max_train_steps=2"
    " --set clip.training.train_batch_size=8 --set denoiser.training.max_train_steps=2"
    " --set denoiser.preview_pictures=8 --set data.pictures.validation_pictures=2",
    "evaluate": "--pictures 20",
}
LONG = ("train", "finetune", "evaluate")


def commands(page):
    """The words of each `$ latentdiff ...` line in the console blocks of a page, without comments."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ latentdiff")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def is_short(words):
    """Whether it ends by itself and trains nothing; tests/test_server.py runs `latentdiff serve`."""
    return not needs_training(words) and words[0] != "serve"


def needs_training(words):
    return words[0] in LONG or any(word.startswith("runs/") for word in words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the README's commands find what they name."""
    folder = tmp_path_factory.mktemp("readme")
    theirs = stable_diffusion.pipeline("1")
    theirs.save_pretrained(folder / "my-models" / "sd15")
    theirs.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    factors = get_peft_model_state_dict(theirs.unet)
    save_file({f"unet.{name}": tensor.contiguous() for name, tensor in factors.items()}, folder / "ink.safetensors")
    as_jsonl(folder / "my-pictures", some_pictures(24))
    shutil.copytree(ROOT / "configs", folder / "configs")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture
def run(call, place, monkeypatch):
    """Run a command in that folder; it must succeed, and print something on standard output."""
    monkeypatch.chdir(place)

    def checked(words):
        code, out, err = call(*words, *shlex.split(QUICK.get(words[0], "")))
        assert (code, bool(out)) == (0, True), f"latentdiff {shlex.join(words)}: {err[-500:]}"

    return checked


@pytest.mark.parametrize("words", [w for w in commands(README) if is_short(w)], ids=" ".join)
def test_a_command_of_the_readme(run, words):
    run(words)


@pytest.mark.slow
def test_the_readmes_training_and_measuring(command, place):
    """In their order, since later ones use what earlier ones leave; each in a process of its own."""
    for words in commands(README):
        if needs_training(words):
            assert command(*words, *shlex.split(QUICK.get(words[0], "")), cwd=place).stdout


def test_the_readmes_python(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = snippets(README)
    exec(compile(code, "README.md", "exec"), names := {})
    assert len(list((place / "drawn").glob("*.png"))) == 4
    assert names["preview"].shape == (1, 3, 64, 64)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_ones_that_the_program_takes(page):
    """Every option exists and has a value of its kind; nothing is run."""
    group = typer.main.get_command(app)
    for words in commands(page):
        if "..." in words or any(word.isupper() and len(word) > 2 for word in words):
            continue  # a pattern, not a command
        command, rest = group, [word for word in words if word not in (">", "|", "<")]
        try:
            while hasattr(command, "commands") and rest and rest[0] in command.commands:
                command, rest = command.commands[rest[0]], rest[1:]
            if rest not in (["--help"], ["--version"]):
                command.make_context("latentdiff", list(rest))
        except Exception as error:
            raise AssertionError(f"latentdiff {shlex.join(words)}: {getattr(error, 'message', error)}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_manual_is_python(page):
    for code in snippets(page):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    made = {"command-line.md", "settings.md", "errors.md"}  # by the code, when the manual is built
    text = re.sub(r"```.*?```|^    .*?$", "", page.read_text(), flags=re.S | re.M)  # without code
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:")) and target.rpartition("/")[2] not in made:
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "lessons").glob("*.py")), ids=lambda script: script.stem)
def test_a_lesson_runs_and_its_claims_hold(script, tmp_path, monkeypatch):
    """As a script; it asserts what it claims."""
    import subprocess
    import sys

    environment = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
