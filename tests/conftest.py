"""One tiny model, trained from nothing by the command line itself, serves every test that needs one."""

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may fetch
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line sets it, before transformers is imported

ROOT = Path(__file__).parent.parent


LONGEST = (
    "reproduce",
    "samplers",
    "flow_families",
    "adapters",
    "calls",
    "convert",
    "schedulers",
    "stable_diffusion",
    "faults",
    "evaluate",
    "single_files",
    "drawing",
    "server",
    "openvino",
    "manual",
    "protocols",
    "server_page",
    "foreign_adapters",
    "straight_path",
    "folder",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow: the cases of `quick` tests that it does not name, and those that slow.txt lists.

    The longest files come first: one at the end would leave the other processes idle. Of the first ones only
    one needs the tiny model: others would wait for its training.
    """
    measured = {line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if item.nodeid.removeprefix("tests/") in measured:
            item.add_marker("slow")
            item.add_marker("measured")
        quick = item.get_closest_marker("quick")
        if quick is not None:
            assert quick.args, item.nodeid
            if item.callspec.id not in quick.args:
                item.add_marker("slow")
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Exclude all that was imported from garbage collection, which would take a fifth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_but_the_tests(tmp_path_factory):
    """Compiled graphs are kept for the tests alone."""
    os.environ["LATENTDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def command():
    """Run the command line in a process of its own; its exit code, stdout and stderr."""
    from .forked import Started

    def run(*words, check=True, **options):
        started = Started(*words, env=dict(os.environ), **options)
        code, err = started.ended()
        assert not check or code == 0, err
        return SimpleNamespace(returncode=code, stdout=started.printed(), stderr=err)

    return run


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command line in this process and an empty folder: exit code, stdout and stderr."""
    from latentdiff.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run


def loosened(model):
    """Make a model folder's parts replaceable: its card no longer says that they were saved together."""
    card = json.loads((model / "latentdiff.json").read_text())
    card.pop("weights", None)
    (model / "latentdiff.json").write_text(json.dumps(card))
    return model


def made_once(factory, name, make):
    """A folder that one of several test processes makes; each gets a copy of its own to work on."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.is_dir():
            unfinished = shared.with_name(f"unfinished-{name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(shared)
    return shutil.copytree(shared, factory.mktemp("own") / name)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The run folder of configs/scenes-tiny.toml: all three stages."""
    return made_once(tmp_path_factory, "scenes-tiny", lambda run: _train(run, short=False))


@pytest.fixture(scope="session")
def tiny_model(tiny_run):
    """The model folder of the tiny run."""
    return tiny_run / "model"


@pytest.fixture(scope="session")
def compiled_model(tiny_model, tmp_path_factory):
    """The tiny model with graphs for OpenVINO.

    A second text layer is added, and the text's effect is increased: so few steps teach little of it.
    """

    def make(folder):
        from safetensors.torch import load_file, save_file

        from latentdiff.families.loading import stored_model
        from latentdiff.runtime.export import export

        loosened(shutil.copytree(tiny_model, folder))
        (file,) = (folder / "unet").glob("*.safetensors")
        weights = load_file(file)
        weights |= {name: 300 * weight for name, weight in weights.items() if name.endswith("attn2.to_v.weight")}
        save_file(weights, file, {"format": "pt"})
        file = folder / "text_encoder" / "model.safetensors"
        weights = load_file(file)
        first = {name: weight for name, weight in weights.items() if "layers.0." in name}
        weights |= {name.replace("layers.0.", "layers.1."): weight.clone() for name, weight in first.items()}
        save_file(weights, file, {"format": "pt"})
        config = folder / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
        export(stored_model(folder), folder)

    return made_once(tmp_path_factory, "compiled", make)


@pytest.fixture(scope="session")
def pipe(tiny_model):
    """The tiny model's pipeline, on the CPU."""
    from latentdiff import LatentDiffusionPipeline

    return LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """The tiny model's pipeline as a server has it: by torch, on the CPU."""
    from latentdiff import LatentDiffusionPipeline

    return LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """A server that draws with it."""
    from .serving import Served

    with Served(tiny, tmp_path_factory.mktemp("served") / "outputs") as server:
        yield server


@pytest.fixture(scope="session")
def photo(tiny):
    """A picture drawn by the tiny model."""
    from .serving import PROMPT

    return tiny(PROMPT, seed=3, num_inference_steps=2).images[0]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny Stable Diffusion of each family, written by diffusers."""
    from . import stable_diffusion

    made = {}
    for family in stable_diffusion.FAMILIES:
        made[family] = tmp_path_factory.mktemp("sd") / family
        stable_diffusion.pipeline(family).save_pretrained(made[family])
    return made


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A short uninterrupted run of the tiny config: killed and resumed runs must end the same."""
    return made_once(tmp_path_factory, "whole", _train)


def _train(run, **options):
    from .forked import train

    code, err = train(run, **options).ended()
    assert code == 0, err


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of it with only the first two stages finished."""
    run = tmp_path / "run"
    shutil.copytree(whole / "clip", run / "clip", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(whole / "model" / "vae", run / "model" / "vae")
    return run
