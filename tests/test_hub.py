"""Hub ids, against a server that stands for the hub: fetched once, at a revision, and only what is read."""

import hashlib
import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

from latentdiff.formats.hub import is_hub_id

from . import stable_diffusion
from .forked import Started, with_hub

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAME = "someone/tiny-diffusion"
OURS = ("words.txt", "clip/open_clip_model.safetensors", "few_steps/pytorch_lora_weights.safetensors")


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of the hub for a model: what a revision holds, and its files."""

    folders: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        prefix = f"/api/models/{NAME}/"
        if path.startswith(prefix + "revision/") or path.startswith(prefix + "tree/"):
            kind, _, rest = path.removeprefix(prefix).partition("/")
            commit = COMMITS.get(rest.split("/")[0], rest.split("/")[0])
            if commit not in self.folders:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            names = [str(p.relative_to(self.folders[commit])) for p in self.folders[commit].rglob("*") if p.is_file()]
            if kind == "tree":
                tree = [
                    {"type": "file", "path": n, "size": (self.folders[commit] / n).stat().st_size, "oid": "0" * 40}
                    for n in names
                ]
                return self.answer(200, json.dumps(tree).encode())
            info = {"id": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in names], "tags": []}
            return self.answer(200, json.dumps(info).encode())
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, name = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            commit = COMMITS.get(revision, revision)
            file = self.folders[commit] / name
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{digest}"'})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def answer(self, code, content, headers=None):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Two commits of a model: in the first also a pickle, a program and weights of another precision."""
    for revision, commit in COMMITS.items():
        folder = tmp_path_factory.mktemp("hub") / revision
        made = stable_diffusion.pipeline("1", seed=len(Hub.folders))
        made.save_pretrained(folder)
        (folder / "v1-5.ckpt").write_bytes(b"\x80\x02 not to be fetched")
        (folder / "pipeline.py").write_text("raise SystemExit")
        for name in OURS:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # a safetensors file without tensors
        (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"x")
        Hub.folders[commit] = folder
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def generate(place, endpoint, *words, offline=False):
    """The exit code and standard error of a command in a process of its own."""
    options = ("-m", NAME, "--steps", "1", "--size", "64x64", "-s", "1", *words)
    hook = partial(with_hub, endpoint, place / "hf", offline)
    return Started("generate", "a castle", *options, cwd=place, hook=hook).ended()


def test_fetched_once_at_a_revision(hub, tmp_path):
    """What is not read is not fetched; the second time nothing is asked of the hub; the commit is in the picture."""
    Hub.asked.clear()
    code, err = generate(tmp_path, hub, "-o", "one.png")
    assert code == 0, err
    fetched = [path for path in Hub.asked if "/resolve/" in path]
    assert any(path.endswith("unet/diffusion_pytorch_model.safetensors") for path in fetched)
    assert all(any(path.endswith(name) for path in fetched) for name in OURS)
    assert not any(path.endswith((".py", ".ckpt")) or "non_ema" in path for path in fetched)
    Hub.asked.clear()
    code, err = generate(tmp_path, hub, "-o", "two.png")
    assert (code, Hub.asked) == (0, []), err
    code, err = generate(tmp_path, hub, "-o", "three.png", "--revision", "v1")
    assert code == 0, err
    from latentdiff.drawing.reproduce import read_record

    records = [read_record(tmp_path / f"{name}.png") for name in ("one", "two", "three")]
    assert [record.model_source for record in records] == [f"{NAME}@{COMMITS[r]}" for r in ("main", "main", "v1")]
    assert records[0].model_hash == records[1].model_hash != records[2].model_hash
    Hub.asked.clear()
    code, _ = generate(tmp_path, "http://127.0.0.1:9", "-o", "four.png", "--revision", COMMITS["v1"], offline=True)
    assert (code, Hub.asked) == (0, [])
    for folder in (tmp_path / "hf").rglob("vae"):  # an interrupted download
        shutil.rmtree(folder)
    code, err = generate(tmp_path, hub, "-o", "five.png")
    assert (code, any("vae" in path for path in Hub.asked)) == (0, True), err


@pytest.mark.parametrize("words", [("--revision", "v9"), ("--variant", "fp16")])
def test_what_the_hub_does_not_have(hub, tmp_path, words):
    code, err = generate(tmp_path, hub, *words)
    assert (code, err.count("\n")) == (4, 1)
    assert err.startswith("error: ")


def test_offline_and_never_fetched(tmp_path):
    code, err = generate(tmp_path, "http://127.0.0.1:9", offline=True)
    assert (code, err.count("\n")) == (4, 1)
    assert err.startswith(f"error: no folder {NAME} here, and it cannot be fetched from the hub: ")


@pytest.mark.parametrize("name", ["model", "a/b/c", "./a/b", "/a/b", "here/model", "a/b.safetensors/"])
def test_what_is_a_path(name, tmp_path, monkeypatch):
    """A place in a folder that is there is never asked of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_hub_id(name)
    assert is_hub_id("owner/name")
