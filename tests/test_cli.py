"""The command line: files, streams and exit codes, as a user or a script sees them."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

PROMPT = "a red circle above a blue square"


def test_generate_writes_what_it_says(command, tiny_model, tmp_path):
    """Eight pictures twice: the same pictures; never overwritten; paths on stdout; image 3 alone equals image 3."""
    words = ("generate", PROMPT, "-m", tiny_model, "-N", 8, "-s", 1, "--steps", 4)
    first = command(*words, cwd=tmp_path).stdout.split()
    again = command(*words, cwd=tmp_path).stdout.split()
    assert [*first, *again] == [f"outputs/{i + 1:05d}-{i % 8 + 1}.png" for i in range(16)]
    for a, b in zip(first, again, strict=True):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()
    command("generate", PROMPT, "-m", tiny_model, "-s", 4, "--steps", 4, "-o", "alone.png", cwd=tmp_path)
    alone, fourth = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("alone.png", first[3]))
    assert np.abs(alone - fourth).max() <= 1

    done = command("generate", PROMPT, "-m", tiny_model, "-o", "alone.png", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: file exists (alone.png). Pictures are never overwritten\n"

    told = json.loads(command("info", tmp_path / "alone.png").stdout)
    assert told["parameters"].startswith(f"{PROMPT}\nSteps: 4, Sampler: DDIM, ")
    assert "Seed: 4, Size: 64x64" in told["parameters"]
    assert told["latentdiff"]["request"]["prompt"] == PROMPT
    assert told["latentdiff"]["request"]["guidance_scale"] == 3.0


def test_prompt_from_standard_input_and_a_cut_prompt(command, tiny_model, tmp_path):
    words = ("generate", "-", "-m", tiny_model, "--steps", 1, "-s", 0, "-o", "one.png", "--no-metadata")
    done = command(*words, cwd=tmp_path, stdin="red " * 50 + "\n")
    assert "warning: prompt has 52 tokens and is cut to the model's 32" in done.stderr
    with Image.open(tmp_path / "one.png") as image:
        assert image.info == {}


def test_info_of_a_model(command, tiny_model):
    told = json.loads(command("info", tiny_model).stdout)
    assert told["class"] == "StableDiffusionPipeline"
    assert (told["prediction"], told["timesteps"], told["terminal_snr"]) == ("v_prediction", 1000, 0.0)
    assert told["parameters"]["total"] == sum(v for k, v in told["parameters"].items() if k != "total")


def test_composition_scores(command, tiny_model, tmp_path):
    words = ("evaluate", "composition", tiny_model, "--pictures", 4, "-o", tmp_path / "scores.json")
    text = command(*words).stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    for title in ("model", "held out", "ceiling"):
        shares = [scores[title][c]["mean"] for c in ("single", "two", "counting", "colors", "position", "binding")]
        assert scores[title]["overall"] == pytest.approx(np.mean(shares))
        assert f"overall       {np.mean(shares):.3f}" in text


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command line in this process: exit code and stderr."""
    from latentdiff.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sampler", "magic"), "sampler: unknown sampler 'magic'; one of ddpm, ddim"),
        (("-W", 7), "width must be a multiple of 8 from 64 to 2048 (got 7)"),
        (("-W", 0), "width must be a multiple of 8 from 64 to 2048 (got 0)"),
        (("-H", 10**9), "height must be a multiple of 8 from 64 to 2048 (got 1000000000)"),
        (("--steps", 0), "num_inference_steps: input should be greater than or equal to 1 (got 0)"),
        (("--steps", 10**6), "num_inference_steps"),
        (("--cfg", "nan"), "guidance_scale: input should be a finite number (got nan)"),
        (("-s", -1), "seed"),
        (("-s", 2**64), "seed"),
        (("-N", 10**9), "num_images"),
        (("--steps", "many"), "valid integer"),
        (("--stepps", 3), "No such option: --stepps"),
        (("-o", "one.png", "-N", 2), "2 pictures do not go into one file"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_loads(call, words, message):
    """Exit 2, with a model path that does not exist: arguments are refused first."""
    code, err = call("generate", PROMPT, "-m", "nowhere", *words)
    assert code == 2
    assert message.lower() in err.lower()
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", " \n ", "x" * 10_000_000])
def test_bad_prompts(call, prompt):
    code, err = call("generate", prompt)
    assert code == 2
    assert err.startswith("error: prompt")
    assert len(err) < 200


def test_missing_things(call, tmp_path):
    assert call("generate", PROMPT, "-m", "nowhere") == (
        4,
        "error: no such model folder (nowhere). Give a folder with a model_index.json\n",
    )
    code, err = call("train", "none.toml")
    assert (code, err) == (2, "error: cannot read config (none.toml): No such file or directory\n")
    (tmp_path / "page.png").write_text("<html>")
    code, err = call("info", "page.png")
    assert code == 3
    assert err.startswith("error: not a readable picture (page.png)")


def test_help_imports_nothing_heavy(command):
    """`--help` and a refused argument answer without torch, diffusers or transformers."""
    import subprocess

    code = (
        "import sys\nfrom latentdiff.cli import main\nsys.argv = ['latentdiff', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'accelerate', 'scipy', 'pydantic', 'PIL'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("loaded: []\n")
    assert command("--version").stdout.strip() == "0.1.0"
