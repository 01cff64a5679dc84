"""What the terminal receives: one printable line a message, whatever names files of others carry."""

import ast
import json
import struct
import subprocess
import sys
import unicodedata

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from latentdiff.core.text import one_line, printable

from .conftest import ROOT

ESCAPES = "a\x1b[2J\x07\x9b31m\u202ereversed\x7f\r\nerror: forged"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b[2Jb", "a\\u001b[2Jb"),
        ("a\x07\x7f\x9b", "a\\u0007\\u007f\\u009b"),
        ("\u202eevil\u2066\u200f", "\\u202eevil\\u2066\\u200f"),
        ("a\nb\r\u2028\x85", "a\\nb\\r\\u2028\\u0085"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\udb40\\udc41"),  # an invisible letter, as JSON escapes it
        ("名前 مرحبا שלום é\u00a0ß 👩\u200d🚀 नमस्ते \\n", "名前 مرحبا שלום é\u00a0ß 👩\u200d🚀 नमस्ते \\n"),
    ],
)
def test_printable(text, line):
    assert printable(text) == line


def test_results_reach_a_pipe_at_once():
    """Standard output to a pipe is buffered, and a process that exits at once loses what is buffered."""
    code = "import os; from latentdiff.cli import terminal; terminal.result('a.png'); os._exit(130)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.stdout, process.returncode) == ("a.png\n", 130)


def test_printable_json_is_the_same_json():
    value = {"prompt": ESCAPES + '\U000e0041 \\ " 👩\u200d🚀'}
    assert json.loads(printable(json.dumps(value, ensure_ascii=False))) == value


def test_a_message_of_several_lines_is_one_line():
    assert one_line("  first\n   second\r\nthird  column\x1b \n") == "  first second third  column\\u001b"


def test_only_one_module_writes_to_the_terminal():
    """No print and no typer.echo in cli/ elsewhere: a foreign name has one way out."""
    for path in (ROOT / "latentdiff" / "cli").glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
        assert path.name == "terminal.py" or not names & {"print", "echo", "secho"}, path


def assert_printable(text, lines):
    """So many lines, and nothing in them that a terminal obeys."""
    assert text.count("\n") == lines
    assert not [c for c in text.replace("\n", "") if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")], text


def lora(path):
    save_file({f"unet.{ESCAPES}.lora_A.weight": torch.zeros(2, 2)}, path)
    return "generate", "a", "--lora", path


def half_a_lora(path):
    """Half of its names are the model's: it is used, and the others are listed."""
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {
            f"{name}.lora_A.weight": torch.zeros(2, 32),
            f"{name}.lora_B.weight": torch.zeros(32, 2),
            ESCAPES: torch.zeros(1),
        },
        path,
    )
    return "generate", "a", "--lora", path


def embedding(path):
    save_file({ESCAPES: torch.zeros(1, 32)}, path)
    return "generate", "a", "--embedding", path


@pytest.mark.parametrize("file", [lora, half_a_lora, embedding])
def test_names_of_tensors(file, call, tiny_model, tmp_path):
    words = file(tmp_path / "file.safetensors")
    code, out, err = call(*words, "-m", tiny_model, "--steps", "1", "-o", tmp_path / "x.png")
    assert_printable(err, err.count("\n"))
    assert "\\u001b[2J" in err
    assert not any(line.startswith("error: forged") for line in err.splitlines())
    assert_printable(out, 0 if code else 1)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"_class_name": ESCAPES}),
        ("model_index.json", {ESCAPES: ["diffusers", "X"]}),
        ("unet/config.json", {"act_fn": ESCAPES}),
        ("scheduler/scheduler_config.json", {"beta_schedule": ESCAPES}),
    ],
)
def test_values_of_a_model_folder(file, change, call, folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders["1"], tmp_path / "sd")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, out, err = call("generate", "a", "-m", folder, "--steps", "1", "-o", tmp_path / "x.png")
    assert code == 4
    assert_printable(out + err, 1)


def test_columns_of_a_table(call, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "metadata.csv").write_bytes(f'file_name,"{ESCAPES}"\na.png,b\n'.encode())
    code, _, err = call("data", "check", folder)
    assert code == 3
    assert_printable(err, 1)


def test_first_bytes_of_a_bad_picture(call, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x1b[2J\x07\nerror: forged")
    code, _, err = call("info", tmp_path / "bad.png")
    assert code == 3
    assert_printable(err, 1)


@pytest.mark.parametrize("key", ["versions", "model", "sources", "scheduler", ESCAPES])
def test_records_of_pictures(key, call, tmp_path):
    """`info` prints them escaped as JSON; `reproduce` refuses them in one line."""
    record = {"version": 3, "prompt": "a", key: {ESCAPES: ESCAPES}}
    about = PngImagePlugin.PngInfo()
    about.add_itxt("latentdiff", json.dumps(record, ensure_ascii=False))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about)
    code, out, err = call("info", tmp_path / "a.png")
    if code == 0:
        assert_printable(out, out.count("\n"))
        assert json.loads(out)["latentdiff"][key] == {ESCAPES: ESCAPES}
    assert_printable(err, 1 if code else 0)
    code, out, err = call("reproduce", tmp_path / "a.png")
    assert code
    assert_printable(out + err, 1)


def test_header_of_a_weights_file(call, tmp_path):
    header = json.dumps({ESCAPES: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, ensure_ascii=False).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    code, out, err = call("info", tmp_path / "a.safetensors")
    assert_printable(err, 1 if code else 0)
    assert_printable(out, out.count("\n"))
