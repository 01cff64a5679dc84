"""The command line: files, streams and exit codes, as a user or a script sees them."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import ROOT
from .forked import Started, with_sigint

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

    description = json.loads(command("info", tmp_path / "alone.png").stdout)
    assert description["parameters"].startswith(f"{PROMPT}\nSteps: 4, Sampler: DDIM, ")
    assert "Seed: 4, Size: 64x64" in description["parameters"]
    assert description["latentdiff"]["request"]["prompt"] == PROMPT
    assert description["latentdiff"]["request"]["guidance_scale"] == 3.0


def test_prompt_from_standard_input_and_a_cut_prompt(command, tiny_model, tmp_path):
    words = ("generate", "-", "-m", tiny_model, "--steps", 1, "-s", 0, "-o", "one.png", "--no-metadata")
    done = command(*words, "--set", "long_prompts=false", cwd=tmp_path, stdin="red " * 50 + "\n")
    assert "warning: prompt has 52 tokens and is cut to the model's 32" in done.stderr
    with Image.open(tmp_path / "one.png") as image:
        assert image.info == {}


def test_info_of_a_model(command, tiny_model):
    description = json.loads(command("info", tiny_model).stdout)
    assert description["class"] == "StableDiffusionPipeline"
    facts = ("prediction", "timesteps", "terminal_snr")
    assert [description[name] for name in facts] == ["v_prediction", 1000, 0.0]
    assert description["parameters"]["total"] == sum(v for k, v in description["parameters"].items() if k != "total")


@pytest.fixture
def call(call):
    """Exit code and stderr."""

    def run(*words):
        code, _, err = call(*words)
        return code, err

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sampler", "magic"), "sampler: unknown sampler 'magic'; one of ddpm, ddim"),
        (("--steps", 0), "num_inference_steps: must be at least 1 (got 0)"),
        (("--steps", 10**6), "num_inference_steps"),
        (("--cfg", "nan"), "guidance_scale: must be a finite number (got nan)"),
        (("-s", -1), "seed"),
        (("-s", 2**64), "seed"),
        (("-N", 10**9), "num_images"),
        (("--eta", 0.5, "--sampler", "unipc"), "eta has no effect on unipc; it applies to"),
        (("--steps", "many"), "valid integer"),
        (("--stepps", 3), "No such option: --stepps"),
        (("-o", "one.png", "-N", 2), "2 pictures do not go into one file"),
        (("-o", "one.gif"), "pictures are written as .png, .jpg, .jpeg, .webp"),
        (("--size", "64"), "--size must be WIDTHxHEIGHT"),
        (("--outpaint", "1,2"), "--outpaint must be LEFT,TOP,RIGHT,BOTTOM"),
        (("--prompts-file", "x.txt"), "give a prompt, or a --prompts-file, and not both"),
        (("--set", "pag_scael=3"), "unknown setting 'pag_scael' (did you mean pag_scale?)"),
        (("--set", "pag_scale=true"), "pag_scale: must be a number (got True)"),
        (("--set", "steps=3"), "unknown setting 'steps' (did you mean num_inference_steps?)"),
        (("--set", "mask_image=a.png"), "mask_image is not a setting: use --mask"),
        (("--set", "=3"), "--set must be NAME=VALUE (got '=3')"),
        (("--set", "seed=3", "-s", 4), "seed is given twice"),
        (("--weaker", "nowhere"), "--weaker has no effect without --set autoguidance_scale"),
        (("--clip", "nowhere"), "--clip has no effect without --clip-guidance-scale"),
        (("--format", "jpg", "-o", "a.png"), "--format applies to the pictures in a folder; a.png is a file"),
        (("--hires-strength", 0.5), "hires_strength requires hires_scale"),
        (("--set", "variation_seed=3"), "a variation requires both variation_seed and variation_strength"),
        (("--outpaint", "0,0,0,0"), "outpaint must add at least one pixel"),
        (("--dtype", "int8"), "'int8' is not one of 'float16', 'bfloat16', 'float32'"),
        (("--hires-scale", "inf"), "hires_scale"),
        (("-o", "/proc/one.png"), "cannot write to /proc/one.png"),
        (("-o", "x" * 300 + ".png"), "cannot write to xxx"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_loads(call, words, message):
    """Exit 2, with a model path that does not exist: arguments are refused first, and nothing is created."""
    code, err = call("generate", PROMPT, "-m", "nowhere", *words)
    assert code == 2
    assert message.lower() in err.lower()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-W", 7), "width must be a multiple of 2 from 2 to 2048 (got 7)"),
        (("-W", 0), "width must be a multiple of 2 from 2 to 2048 (got 0)"),
        (("-H", 10**9), "height must be a multiple of 2 from 2 to 2048 (got 1000000000)"),
        (("--device", "meta"), "device 'meta' cannot be used here"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(call, tiny_model, tmp_path, words, message):
    for file in shutil.copytree(tiny_model, tmp_path / "model").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])  # would be exit 4 if it were read
    code, err = call("generate", PROMPT, "-m", "model", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message}")
    assert [path.name for path in Path().iterdir()] == ["model"]


@pytest.mark.parametrize("prompt", ["", " \n ", "x" * 10_000_000])
def test_bad_prompts(call, prompt):
    code, err = call("generate", prompt)
    assert code == 2
    assert err.startswith("error: prompt")
    assert len(err) < 200


def test_missing_things(call, tmp_path):
    assert call("generate", PROMPT, "-m", "nowhere") == (
        4,
        "error: no such model folder (nowhere). Give a folder with a model_index.json, or a .safetensors\n",
    )
    for command in ("info", "reproduce"):
        code, err = call(command, "none.png")
        assert (code, err.count("\n")) == (2 if command == "info" else 3, 1)
        assert err.startswith("error: no such file")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n   ")
    assert call("generate", PROMPT, "-m", "photo.png")[1].startswith("error: photo.png is not a safetensors file")
    assert call("generate", PROMPT, "-m", "none.safetensors")[1].startswith("error: no such file (none.safetensors)")
    code, err = call("train", "none.toml")
    assert (code, err) == (2, "error: cannot read config (none.toml): No such file or directory\n")
    (tmp_path / "page.png").write_text("<html>")
    code, err = call("info", "page.png")
    assert code == 3
    assert err.startswith("error: not a readable picture (page.png)")


def test_no_arguments_show_the_help(call):
    for words in ((), ("data",)):
        code, err = call(*words)
        assert (code, err.startswith(f"Usage: {' '.join(('latentdiff', *words))} [OPTIONS]")) == (2, True)


def test_standard_input_that_is_not_text(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    assert call("generate", "-") == (2, "error: prompt: standard input is not text in UTF-8\n")


def test_a_negative_prompt_without_guidance_has_one_warning(call, tiny_model):
    words = ("-m", tiny_model, "-n", "blue", "--cfg", 1, "--steps", 1, "-o", "one.png")
    assert call("generate", PROMPT, *words) == (
        0,
        "warning: the negative prompt has no effect: it requires guidance_scale over 1\n",
    )


def test_numbers_go_on_after_five_digits(call, tiny_model):
    Path("outputs").mkdir()
    Path("outputs/99999-1.png").touch()
    for _ in range(2):
        assert call("generate", PROMPT, "-m", tiny_model, "--steps", 1, "-s", 1) == (0, "")
    names = sorted(path.name for path in Path("outputs").iterdir())
    assert names == ["100000-1.png", "100001-1.png", "99999-1.png"]


def test_the_end_of_memory_is_told_in_one_line(call, monkeypatch):
    """On a CPU torch raises a bare RuntimeError."""

    def app(**options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("latentdiff.cli._command", lambda: app)
    code, err = call("generate", PROMPT)
    assert (code, err.count("\n")) == (6, 1)
    assert err.startswith("error: out of memory.")


def test_a_full_disk_stops_convert_in_one_line(call, tiny_model):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        code, err = call("convert", tiny_model, "copy", "--dtype", "float16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (code, err.count("\n")) == (6, 1)
    assert err.startswith("error: ")
    assert not Path("copy").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": "\\ud800"}'])
def test_info_of_a_hostile_record(call, content):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("latentdiff", content)
    Image.new("RGB", (4, 4)).save("odd.png", pnginfo=info)
    code, err = call("info", "odd.png")
    assert (code, err.count("\n")) in ((3, 1), (0, 0))


def test_info_of_a_bomb(call):
    Image.new("1", (20_000, 20_000)).save("bomb.png")
    code, err = call("info", "bomb.png")
    assert code == 3
    assert err.startswith("error: not a readable picture (bomb.png)")


def heeding():
    """Handle SIGINT, which shells ignore for background processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
def test_stopped_in_the_midst_of_an_import(tmp_path, number, code, message):
    """Libraries abort, or go on, where an import of theirs is broken off."""
    (tmp_path / "slow.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "torch.py").write_text("try:\n    import slow\nexcept BaseException:\n    pass\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "latentdiff", "generate", PROMPT, "--runtime", "torch"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, f"error: {message}\n")


@pytest.mark.parametrize(("number", "code", "message"), [(signal.SIGINT, 130, "interrupted"), (15, 143, "terminated")])
def test_stopped_by_a_signal(tiny_model, tmp_path, number, code, message):
    """One line, the shell's exit code, and the pictures written so far stay whole."""
    words = ("generate", PROMPT, "-m", tiny_model, "-N", "500", "--batch-size", "1", "-s", "7")
    started, first = Started(*words, cwd=tmp_path, hook=with_sigint), tmp_path / "outputs" / "00001-7.png"
    while not first.exists():
        assert started.process.is_alive(), started.ended()
        time.sleep(0.05)
    os.kill(started.process.pid, number)
    assert started.ended() == (code, f"error: {message}\n")
    for path in first.parent.iterdir():
        Image.open(path).load()


def test_help_imports_nothing_heavy(command):
    """`--help` and a refused argument answer without torch, diffusers or transformers."""
    code = (
        "import sys\nfrom latentdiff.cli import main\nsys.argv = ['latentdiff', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'accelerate', 'scipy', 'pydantic', 'PIL'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("loaded: []\n")
    assert command("--version").stdout.strip() == "0.1.0"
