"""`latentdiff evaluate`: every section, one report, and what happens when it is stopped, asked wrongly or damaged."""

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core import files
from latentdiff.core.errors import DataError
from latentdiff.diffusion import noise
from latentdiff.drawing.pixels import reconstruct
from latentdiff.drawing.record import Source
from latentdiff.evaluation.autoencoder import decoded, psnr, ssim
from latentdiff.evaluation.evaluate import titles
from latentdiff.evaluation.features import Extractor, of_model
from latentdiff.evaluation.geneval import read_prompts
from latentdiff.evaluation.held_out import held_out, pictures_of
from latentdiff.evaluation.meaning import MEANING
from latentdiff.evaluation.pictures import draw_pictures
from latentdiff.evaluation.report.plots import Plot, Series, as_figure
from latentdiff.evaluation.report.report import as_lines, compared
from latentdiff.evaluation.result import Figure, Result, as_tree, from_tree, mean
from latentdiff.evaluation.sections import _share_nearer
from latentdiff.evaluation.sweep import combinations, pareto
from latentdiff.families.loading import included_model
from latentdiff.model import ModelCard
from latentdiff.settings.config import load_config

from .conftest import loosened
from .forked import train

QUICK = ("--pictures", 16, "--times", 1, "--runtime", "torch", "--steps", 2)
EVERYTHING = ["likelihood", "distances", "composition", "autoencoder", "diversity", "memorisation", "sweep", "geneval"]
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [], "prompt": "two clocks"},
]


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def figures(folder, section, model=0):
    return {name: f["value"] for name, f in metrics(folder)["models"][model]["sections"][section]["figures"].items()}


@pytest.fixture(scope="module")
def whole_report(command, tiny_model, tmp_path_factory):
    """All that can be measured of the tiny model: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("report") / "out"
    prompts = folder.parent / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    sweep = ("--sweep", "sampler=ddim,unipc")
    done = command("evaluate", tiny_model, "-o", folder, *QUICK, *sweep, "--geneval", prompts)
    return folder, done


def test_a_whole_report(whole_report):
    folder, done = whole_report
    report = metrics(folder)
    assert list(report["models"][0]["sections"]) == EVERYTHING
    assert report["skipped"] == {"recognition": "it requires scenes of sprites and a judge (--judge)"}
    assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    for section in report["models"][0]["sections"].values():
        assert section["facts"]["seconds"] >= 0
        for name, figure in section["figures"].items():
            assert np.isfinite(figure["value"]), name
            assert figure["better"] in ("lower", "higher", "neither")
    outcome = figures(folder, "likelihood")
    total = sum(outcome[f"term_{name}"] for name in ("prior", "denoising", "reconstruction", "decoder", "posterior"))
    assert total == pytest.approx(outcome["bits_per_dimension_with_captions"], rel=1e-9)
    categories = figures(folder, "composition")
    six = ("single", "two", "counting", "colors", "position", "binding")
    for suffix in ("", "_held_out", "_ceiling"):
        shares = [categories[name + suffix] for name in six]
        assert categories["composition" + suffix] == pytest.approx(np.mean(shares))
    assert report["settings"]["pictures"] == 16
    assert len(report["settings"]["features sha256"]) == 64
    assert "torch" in report["settings"]["versions"]


class Page(HTMLParser):
    """What a page loads, its headings and words."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone(whole_report):
    folder, _ = whole_report
    page = Page((folder / "report.html").read_text())
    assert all(value.startswith(("data:image/", "#")) for value in page.loads)
    assert {value for value in page.loads if value[0] == "#"} == {
        f"#{name}" for name in [*EVERYTHING, "not%20measured", "settings"]
    }
    assert "script" not in page.tags
    assert set(EVERYTHING) < set(page.words)
    assert page.tags.count("img") > 40
    for name, figure in metrics(folder)["models"][0]["sections"]["distances"]["figures"].items():
        assert name.replace("_", " ") in page.words
        assert str(Figure(figure["value"], figure["error"])) in page.words


def test_measured_once(whole_report, call, tiny_model):
    """The same command measures nothing again; another section is added to the same folder."""
    folder, _ = whole_report
    before = {path: path.stat().st_mtime_ns for path in (folder / "A").rglob("*.*")}
    sweep = ("--sweep", "sampler=ddim,unipc")
    prompts = folder.parent / "evaluation_metadata.jsonl"
    report = metrics(folder)
    code, out, _ = call("evaluate", tiny_model, "-o", folder, *QUICK, *sweep, "--geneval", prompts)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "A").rglob("*.*")} == before
    assert metrics(folder) == report
    assert "distances" in out


def test_geneval_reads_what_was_drawn(whole_report):
    """As its evaluator walks a folder: digits name the prompts, digits the pictures; each line is its own prompt."""
    folder, _ = whole_report
    places = [path for path in sorted((folder / "A" / "geneval").iterdir()) if path.is_dir() and path.name.isdigit()]
    assert [path.name for path in places] == ["00000", "00001"]
    for place, row in zip(places, PROMPTS, strict=True):
        assert json.loads((place / "metadata.jsonl").read_text()) == row
        names = sorted(path.name for path in (place / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert all(re.match(r"\d+\.png", name) for name in names)
        pictures = [np.asarray(Image.open(place / "samples" / name)) for name in names]
        assert all(picture.shape == (64, 64, 3) for picture in pictures)
        assert not np.array_equal(pictures[0], pictures[1])
        assert np.array_equal(np.asarray(Image.open(place / "grid.png")), np.concatenate(pictures, 1))


def test_pictures_are_those_of_the_pipeline(whole_report, tiny_model, pipe):
    """Each drawn from its caption, with seeds that count."""
    folder, _ = whole_report
    _, captions = pictures_of(held_out(load_config(None), 16)[0])
    image = draw_pictures(pipe.painter, captions, seed=0, num_inference_steps=2)
    kept = [np.asarray(Image.open(path)) for path in sorted((folder / "A" / "drawn").iterdir())]
    assert np.array_equal(image, np.stack(kept))
    one = pipe(captions[3], seed=3, num_inference_steps=2, output_type="uint8").images[0]
    assert np.abs(one.astype(int) - kept[3]).max() <= 1


@pytest.mark.slow
def test_one_that_was_interrupted_ends_the_same(whole_report, call, tiny_model, tmp_path):
    """Half of the pictures and sections are gone: what is made again is what was there."""
    folder, _ = whole_report
    cut = shutil.copytree(folder, tmp_path / "cut")
    sections = ("likelihood", "distances", "composition", "memorisation")
    begun = ("A/drawn/00003.png", "A/composition/held-out/two/00001.png", "metrics.json", "report.html")
    for name in (*(f"A/{section}.json" for section in sections), *begun):
        (cut / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (cut / "A/likelihood").iterdir()}
    assert kept
    sweep = ("--sweep", "sampler=ddim,unipc")
    prompts = folder.parent / "evaluation_metadata.jsonl"
    assert call("evaluate", tiny_model, "-o", cut, *QUICK, *sweep, "--geneval", prompts)[0] == 0
    for section in EVERYTHING:
        assert figures(cut, section) == figures(folder, section)
    for name in begun[:2]:
        assert (cut / name).read_bytes() == (folder / name).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in (cut / "A/likelihood").iterdir()} == kept, "not computed again"


@pytest.mark.slow
def test_training_measures_the_same(begun, whole, call, tmp_path):
    """The last validation's distances, to the last digit."""
    shutil.copytree(whole / "model" / "clip", begun / "model" / "clip")
    few = (
        "denoiser.training.max_train_steps=4",
        "denoiser.training.validation_steps=4",
        "denoiser.distance_pictures=24",
    )
    code, err = train(begun, "--stage", "denoiser", *[word for each in few for word in ("--set", each)]).ended()
    assert code == 0, err
    last = json.loads((begun / "denoiser" / "log.jsonl").read_text().splitlines()[-1])
    words = ("--pictures", 24, "--runtime", "torch", "--only", "distances", "--data", begun / "config.toml")
    assert call("evaluate", begun / "model", "-o", tmp_path / "out", *words)[0] == 0
    outcome = figures(tmp_path / "out", "distances")
    assert {"frechet", "kernel", "precision", "recall", "cmmd", "clip_score"} < outcome.keys()
    for name, value in outcome.items():
        assert name.endswith("_floor") or last[name] == value, name


def damaged(model, folder, share):
    """A copy with noise in the weights of the U-Net and the autoencoder."""
    loosened(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("openvino")))
    for part in ("unet", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        state = load_file(file)
        for number, (name, tensor) in enumerate(state.items()):
            if tensor.ndim > 1:
                eps = torch.from_numpy(noise.normal(tuple(tensor.shape), 0, part, number))
                state[name] = (tensor + share * tensor.float().std() * eps).to(tensor.dtype)
        file.unlink()
        save_file(state, file)
    return folder


@pytest.mark.slow
def test_two_models(call, tiny_model, tmp_path):
    """A damaged copy beside its original: on the same draws, and worse where a barely trained model can be."""
    other = damaged(tiny_model, tmp_path / "damaged", 0.5)
    words = ("--only", "likelihood,autoencoder,distances", "--compare", other)
    code, out, err = call("evaluate", tiny_model, "-o", tmp_path / "out", *QUICK, *words)
    assert code == 0, err
    both = metrics(tmp_path / "out")["models"]
    assert [model["name"] for model in both] == ["scenes-tiny (model)", "scenes-tiny (damaged)"]
    for name in ("bits_per_dimension_with_captions", "bits_per_dimension_without_captions"):
        first, second = (figures(tmp_path / "out", "likelihood", model)[name] for model in (0, 1))
        assert second > first
    assert figures(tmp_path / "out", "autoencoder", 1)["psnr"] < figures(tmp_path / "out", "autoencoder")["psnr"]
    line = next(line for line in out.splitlines() if line.startswith("  psnr "))
    assert "worse by" in line
    by = json.loads((tmp_path / "out" / "metrics.json").read_text())["second_is_worse_by"]["autoencoder"]["psnr"]
    assert f"worse by {Figure(by['value'], by['error'])}" in line
    assert next(line for line in out.splitlines() if "scenes-tiny (damaged) is" in line).split()[-1] == "is"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "scenes-tiny (damaged) is" in page
    assert page.count('class="plot"') == 1, "both in the same axes"
    assert "worse by" in page


@pytest.mark.slow
def test_the_default_model_damaged_is_worse_in_every_figure(command, tmp_path):
    other = damaged(included_model("scenes-64"), tmp_path / "damaged", 0.15)
    words = ("--only", "likelihood,distances,composition,autoencoder", "--compare", other)
    done = command("evaluate", "-o", tmp_path / "out", "--pictures", 160, "--times", 4, *words)
    lines = [line for line in done.stdout.splitlines() if re.search(r"  (lower|higher) ", line)]
    assert len(lines) > 30
    assert all("worse by" in line for line in lines), "\n".join(lines)


@pytest.mark.slow
def test_own_pictures(call, tmp_path, folders):
    """A folder, a model of another kind, and by whose features."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number in range(18):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(data / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"picture (number) {number}"}))
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    words = ("--only", "distances,autoencoder,likelihood", "--data", data)
    out = tmp_path / "out"
    code, _, err = call("evaluate", folders["1"], "-o", out, *QUICK, *words)
    assert code == 0, err
    assert metrics(out)["settings"]["features"] == "the CLIP of scenes-64"
    assert "has no CLIP; that of scenes-64 is used, which knows only scenes" in err
    assert metrics(out)["settings"]["pictures"] == 16
    assert "clip_score" in figures(out, "distances")
    assert "not measured" not in err
    words = ("--data", data, "--only", "memorisation")
    code, _, err = call("evaluate", folders["1"], "-o", tmp_path / "other", *QUICK, *words)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: memorisation cannot be measured: no pictures are known")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", ""), "unknown section ''; one of likelihood, "),
        (("--only", "likelyhood"), "unknown section 'likelyhood' (did you mean likelihood?); one of likelihood, "),
        (("--sweep", "guidance_scale"), "--sweep must be NAME=VALUE,VALUE, each name once (got 'guidance_scale')"),
        (("--sweep", "guidance_scale=1,many"), "guidance_scale"),
        (("--sweep", "steps_=1,2"), "steps_"),
        (("--sweep", "steps=1,2", "--only", "likelihood"), "--sweep requires the section sweep: name it in --only"),
        (("--set", "num_images=3"), "the evaluation chooses num_images"),
        (("--set", "seed=3"), "the evaluation chooses seed"),
        (("--set", "hires_scale=2"), "the evaluation chooses hires_scale"),
        (("--set", "autoguidance_scale=2"), "autoguidance_scale has no effect in an evaluation"),
        (("--set", "eta=0.5"), "eta has no effect on unipc; it applies to"),
        (
            ("--sweep", f"num_inference_steps={','.join(['5'] * 40)}", "--sweep", f"seed_={','.join(['1'] * 30)}"),
            "1,200",
        ),
        (("--data", "data", "-o", "data/report"), "data/report lies inside the data and would add pictures to it"),
        (("--steps", "0"), "num_inference_steps"),
        (("--pictures", "3"), "must be at least 16"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", ""), "data.pictures.source is missing: give the pictures"),
        (("--features", "nowhere"), "no CLIP in open_clip's format at nowhere"),
        (("--lpips", "nowhere"), "cannot load nowhere"),
        (("--geneval", "nowhere"), "nowhere cannot be read (No such file or directory)"),
        (("--compare", "nowhere"), "nowhere"),
        (("-o", "/proc/report"), "cannot write to /proc/report"),
        (("-o", "a-file"), "a-file is a file. Name a folder for the report"),
        (("-o", "mine"), "mine has other files, and nothing is written beside them. Name another"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(call, tiny_model, words, message):
    Path("a-file").write_text("mine")
    Path("mine").mkdir()
    Path("mine/precious").write_text("mine")
    Path("data").mkdir()
    code, _, err = call("evaluate", tiny_model, *words)
    assert code in (2, 3, 4)
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert sorted(path.name for path in Path("mine").iterdir()) == ["precious"]


def test_a_folder_of_another_report(call, tiny_model):
    quick = (*QUICK, "--only", "autoencoder", "-o", "out")
    assert call("evaluate", tiny_model, *quick)[0] == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
    code, _, err = call("evaluate", tiny_model, *quick, "--seed", 1)
    assert code == 2
    assert err == "error: out is the report of other settings (seed 0 -> 1). Name another folder\n"
    assert {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()} == before


def test_sections_of_several_starts_come_together(call, tiny_model):
    """A report keeps what other starts measured; a section of which a picture is missing is measured anew."""
    for only in ("diversity", "autoencoder"):
        assert call("evaluate", tiny_model, *QUICK, "--only", only, "-o", "out")[0] == 0
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert list(metrics["models"][0]["sections"]) == ["autoencoder", "diversity"]
    kept = Path("out/A/autoencoder.json")
    before = kept.stat().st_mtime_ns
    assert call("evaluate", tiny_model / ".." / tiny_model.name, *QUICK, "--only", "autoencoder", "-o", "out")[0] == 0
    assert kept.stat().st_mtime_ns == before, "the same model by another path"
    missing = sorted(Path("out/A/autoencoder/shown").iterdir())[0]
    content = missing.read_bytes()
    missing.unlink()
    assert call("evaluate", tiny_model, *QUICK, "--only", "autoencoder", "-o", "out")[0] == 0
    assert missing.read_bytes() == content


def test_pictures_that_cannot_be_used(call, tiny_model):
    Path("data").mkdir()
    for number in range(18):
        Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(f"data/{number:02d}.png")
        Path(f"data/{number:02d}.txt").write_text(f"number {number}")
    Path("data/00.png").write_bytes(b"no picture")
    Path("data/01.txt").unlink()
    command = (*QUICK, "--only", "autoencoder", "--data", "data", "-o", "out")
    code, _, err = call("evaluate", tiny_model, *command)
    assert (code, err.count("\n")) == (3, 1)
    assert call("evaluate", tiny_model, *command, "--skip-bad")[0] == 0
    assert json.loads(Path("out/settings.json").read_text())["left out"] == 2
    shutil.rmtree("out")
    code, _, err = call("evaluate", tiny_model, *command, "--skip-bad", "--allow-missing-captions")
    assert code == 0
    assert "left out: 1 that cannot be used (`latentdiff data` lists them)" in err
    assert json.loads(Path("out/settings.json").read_text())["pictures"] == 16


def test_what_fails_leaves_no_folder(call, tiny_model):
    Path("lines.jsonl").write_text('{"tag": "counting", "prompt": "two rings"}\n')
    assert call("evaluate", tiny_model, *QUICK, "--only", "geneval", "-o", "out")[0] == 2
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/.lock").touch()  # of one that was killed before it had begun
    once = (*QUICK, "--only", "geneval", "--geneval", "lines.jsonl", "-o", "out")
    assert call("evaluate", tiny_model, *once)[0] == 0
    Path("lines.jsonl").write_text('{"tag": "counting", "prompt": "three rings"}\n')
    code, _, err = call("evaluate", tiny_model, *once)
    assert code == 2
    assert err.startswith("error: out is the report of other settings (geneval sha256 ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ("{", "line 1 is not valid JSON"),
        ("[1]\n", 'line 1 has no "prompt"'),
        ('{"tag": "counting", "prompt": " "}', 'line 1 has no "prompt"'),
        ('\n{"tag": "shape", "prompt": "a"}', 'line 2: "tag" is none of single_object, two_object'),
    ],
)
def test_prompts_that_are_not_genevals(content, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('\ufeff{"tag": "counting", "prompt": "a"}\n', ["a"]),
        ('{"tag": "counting", "prompt": "a\u2028b"}\r\n', ["a\u2028b"]),
    ],
)
def test_prompts_as_others_write_them(content, prompts, tmp_path):
    (tmp_path / "p.jsonl").write_text(content, encoding="utf-8", newline="")
    assert [row["prompt"] for row in read_prompts(tmp_path / "p.jsonl")] == prompts


def test_what_figures_depend_on_is_no_secret(call, tiny_model, tmp_path):
    """A report does not go on with another schedule, scale of the latents, background or prefix of the captions."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    Path("data").mkdir()
    for number in range(16):
        Image.new("RGBA", (16, 16), (9 * number, 0, 0, 128)).save(f"data/{number:02d}.png")
        Path(f"data/{number:02d}.txt").write_text(f"number {number}")
    quick = (*QUICK, "--only", "autoencoder")
    settings = 'data.kind = "pictures"\nimage_size = 64\n[data.pictures]\nsource = "data"\n'
    Path("c.toml").write_text(settings)
    assert call("evaluate", model, *quick, "-o", "out", "--data", "c.toml")[0] == 0
    for more in ('background = "#000000"', '[data.pictures.captions]\nprefix = "a red star "'):
        Path("c.toml").write_text(settings + more + "\n")
        code, _, err = call("evaluate", model, *quick, "-o", "out", "--data", "c.toml")
        assert (code, "out is the report of other settings (data sha256 " in err) == (2, True), err
    Path("c.toml").write_text(settings)
    assert call("evaluate", model, *quick, "-o", "out", "--data", "c.toml")[0] == 0
    for name in ("vae/config.json", "scheduler/scheduler_config.json"):
        before = (model / name).read_text()
        (model / name).write_text(before.replace("1000", "900") if "scheduler" in name else before + "\n")
        code, _, err = call("evaluate", model, *quick, "-o", "out", "--data", "c.toml")
        assert (code, "(model settings sha256 1 " in err) == (2, True), err
        (model / name).write_text(before)


def test_networks_that_are_not_finite(call, tiny_model, tmp_path):
    """An autoencoder or a CLIP of NaN raises an error, and no report is written."""
    for part, section in (("vae", "autoencoder"), ("clip", "distances")):
        model = loosened(shutil.copytree(tiny_model, tmp_path / part))
        (file,) = (model / part).glob("*.safetensors")
        state = {
            name: tensor * float("nan") if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        file.unlink()
        save_file(state, file)
        code, _, err = call("evaluate", model, *QUICK, "--only", section, "-o", tmp_path / f"out-{part}")
        assert code == 5, err
        assert "finite" in err.splitlines()[-1]


def test_captions_that_are_empty_are_drawn(pipe):
    """As the unconditional model draws: guidance between the same two contexts changes nothing."""
    empty = draw_pictures(pipe.painter, ["", "two pink rings"], seed=0, num_inference_steps=2, guidance_scale=90.0)
    plain = draw_pictures(pipe.painter, ["", "two pink rings"], seed=0, num_inference_steps=2, guidance_scale=1.0)
    assert np.abs(empty[0].astype(int) - plain[0]).max() <= 1
    assert np.abs(empty[1].astype(int) - plain[1]).max() > 1


def test_kept_pictures_of_another_size(pipe, tmp_path):
    prompts = ["a red star"] * 2
    draw_pictures(pipe.painter, prompts, seed=0, folder=tmp_path, num_inference_steps=2)
    Image.new("RGB", (32, 32)).save(tmp_path / "00001.png")
    with pytest.raises(DataError, match="has another shape"):
        draw_pictures(pipe.painter, prompts, seed=0, folder=tmp_path, num_inference_steps=2)


def test_a_folder_of_one_that_was_killed_at_once(call, tiny_model):
    """An evaluation that was killed while it claimed its folder can be started again."""
    left = Path("out/.latentdiff-abc")
    left.mkdir(parents=True)
    (left / files._MARK).touch()
    os.utime(left, (time.time() - 60,) * 2)
    Path("out/.lock").touch()
    assert call("evaluate", tiny_model, *QUICK, "--only", "autoencoder", "-o", "out")[0] == 0
    assert not list(Path("out").glob(".latentdiff*"))


def test_lists_are_swept(call, tiny_model):
    words = ("--sweep", "guidance_interval=[-3,1],[-2,2]", "--sweep", "negative_prompt=a/b,a-b", "--steps", 2)
    code, _, err = call("evaluate", tiny_model, *QUICK[:-2], *words, "--only", "sweep", "-o", "out")
    assert code == 0, err
    (table,) = metrics(Path("out"))["models"][0]["sections"]["sweep"]["tables"]
    assert [row[:2] for row in table["rows"]] == [
        [interval, prompt] for interval in ("[-3, 1]", "[-2, 2]") for prompt in ("a/b", "a-b")
    ]
    assert len(list(Path("out/A/sweep").iterdir())) == 4


def test_the_share_by_chance():
    """Of independent pictures k / (N + 1) are nearer than the k-th of N, within what 400 trials tell."""
    rng = np.random.default_rng(0)
    for count, k in ((16, 1), (300, 3)):
        outcome = [_share_nearer(rng.normal(size=200), rng.normal(size=count)) for _ in range(400)]
        assert abs(np.mean(outcome) - k / (count + 1)) < 3 * np.std(outcome, ddof=1) / 20


def test_psnr_and_ssim():
    a = np.random.default_rng(0).integers(0, 200, (3, 16, 16, 3), np.uint8)
    b = a + np.array([0, 5, 50], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), [100, 20 * np.log10(255 / 5), 20 * np.log10(255 / 50)])
    outcome = ssim(a, b)
    assert outcome[0] == pytest.approx(1, abs=1e-6)
    assert outcome[0] > outcome[1] > outcome[2]
    flat = np.array([0, 60, 128, 250], np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    x, y, c = flat[:, 0, 0, 0] / 255, (flat[:, 0, 0, 0] + 5) / 255, 0.01**2
    np.testing.assert_allclose(ssim(flat, flat + 5), (2 * x * y + c) / (x**2 + y**2 + c), rtol=1e-3)  # its first factor


def test_statistics_of_latents(pipe):
    pictures, _ = pictures_of(held_out(load_config(None), 20)[0])
    outcome = decoded(pipe.model, pictures)
    latents = np.concatenate([np.asarray(pipe.encode(pictures[n : n + 1])) for n in range(20)])
    np.testing.assert_allclose(outcome.mean, latents.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(outcome.std, latents.std((0, 2, 3)), rtol=1e-5)
    assert np.abs(outcome.pictures[:2].astype(int) - reconstruct(pipe.model, pictures[:2])).max() <= 1


def test_pareto():
    assert pareto([(1, 5), (2, 6), (3, 2), (0.5, 9), (4, 2), (3, 3)]) == [3, 0, 2]
    assert pareto([(1, 1)]) == [0]
    assert combinations({"a": (1, 2), "b": ("x",)}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]


def test_figures_have_the_digits_of_their_errors():
    assert str(Figure(0.0157123, 0.00042)) == "0.01571 \N{PLUS-MINUS SIGN} 0.00042"
    assert str(Figure(86.0833, 0.158)) == "86.08 \N{PLUS-MINUS SIGN} 0.16"
    assert str(Figure(8.4e-5, 6e-5)) == "0.000084 \N{PLUS-MINUS SIGN} 0.000060"
    assert str(Figure(-0.2942)) == "-0.2942"
    assert str(Figure(1.0, 0.0)) == "1 \N{PLUS-MINUS SIGN} 0"


def test_every_figure_is_told_what_it_is(whole_report):
    folder, _ = whole_report
    variants = re.compile("_(large_variance|held_out|ceiling|floor)$")
    for section in metrics(folder)["models"][0]["sections"].values():
        assert {
            name for name in section["figures"] if name not in MEANING and variants.sub("", name) not in MEANING
        } == set()


def test_a_model_is_called_by_what_is_loaded_beside_it():
    def candidate(name, *paths):
        sources = {path: Source("lora", path, "0" * 64) for path in paths}
        painter = SimpleNamespace(model=SimpleNamespace(card=ModelCard(name)), sources=sources)
        return SimpleNamespace(painter=painter, path=name)

    assert titles([candidate("m", "loras/ink.safetensors"), candidate("m")]) == ["m + ink", "m"]
    assert titles([candidate("m"), candidate("m")]) == ["m (A)", "m (B)"]


def test_which_is_worse():
    assert compared(Figure(1.0, 0.1, "lower"), Figure(2.0, 0.1, "lower")) == "worse by 1.00 \N{PLUS-MINUS SIGN} 0.14"
    assert compared(Figure(1.0, None, "higher"), Figure(2.0, None, "higher")) == "better by 1"
    assert compared(Figure(1.0, 1.0, "lower"), Figure(2.0, 1.0, "lower")).endswith(", within the error")
    assert compared(Figure(1.0, better="lower"), Figure(1.0, better="lower")) == "the same"
    assert compared(Figure(1.0), Figure(2.0)) == ""
    assert compared(Figure(1.0, 0.1, "lower"), Figure(float("nan"), 0.1, "lower")) == ""
    values = np.random.default_rng(0).normal(0, 10, 50)
    by = mean(values + 1, "lower", paired=True).worse(mean(values, "lower", paired=True))
    assert (by.value, by.error) == pytest.approx((1, 0), abs=1e-9), "on the same draws their spread cancels"


def test_bits_of_other_numbers_of_values_are_not_compared():
    """As of a model of grey pictures beside one in colour."""
    results = [Result({"psnr": Figure(value, 0.1, "lower")}, {"dimensions": n}) for value, n in ((1.0, 3), (2.0, 1))]
    assert "the same" in "".join(as_lines(["a", "b"], "likelihood", [results[0]] * 2))
    text = "\n".join(as_lines(["a", "b"], "likelihood", results))
    assert "worse" not in text
    assert text.splitlines()[0] == "likelihood (dimensions 3 and 1)"


def test_a_result_as_json():
    plot = Plot("p", "x", "y", [Series("s", [1.0, 2.0], [3.0, float("nan")], False, ["a", "b"])], "x")
    outcome = Result({"f": Figure(1.0, None, "lower", (1.0, 2.0))}, {"n": np.int64(3)}, [plot])
    tree = json.loads(json.dumps(as_tree(outcome), allow_nan=False))
    back = from_tree(tree)
    assert back.figures["f"].value == 1.0
    assert back.figures["f"].error is None
    assert list(back.figures["f"].each) == [1.0, 2.0]
    assert back.facts == {"n": 3}
    assert np.isnan(back.plots[0].series[0].y[1])


def test_plots_are_the_same_bytes_and_escaped():
    plot = Plot(
        "<b>", "x & y", "y", [Series("s", range(2000), np.arange(2000.0)), Series("t", [1], [2.0], False, ["n"])]
    )
    assert as_figure(plot) == as_figure(plot)
    assert "<b>" not in as_figure(plot)
    assert as_figure(Plot("none", "x", "y", [Series("s", [1.0], [float("nan")])])) == ""


def test_held_out_pictures(tmp_path):
    """Those that validation holds out, none of which are trained on; without them the first by identity."""
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    base = [("data.kind", "pictures"), ("data.pictures.source", str(tmp_path)), ("image_size", 16)]
    held, trained = held_out(load_config(None, [*base, ("data.pictures.validation_pictures", 5)]), 100)
    assert (len(held), len(trained)) == (5, 7)
    captions = [pictures_of(each)[1] for each in (held, trained)]
    assert sorted(captions[0] + captions[1]) == sorted(f"number {n}" for n in range(12))
    whole, none = held_out(load_config(None, base), 100)
    assert none is None
    assert pictures_of(whole)[1][:5] == captions[0]
    pixels, _ = pictures_of(held_out(load_config(None, base), 3)[0])
    assert pixels.shape == (3, 16, 16, 3)


def test_features_do_not_depend_on_the_batch(tiny_model):
    pictures, _ = pictures_of(held_out(load_config(None), 40)[0])
    extractor = of_model(tiny_model)
    whole = extractor.of(pictures)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    assert np.array_equal(extractor.of(pictures[32:]), whole[32:])
    assert np.array_equal(extractor.of(pictures[:1]), whole[:1])


def test_features_of_known_pictures_are_kept(tmp_path, monkeypatch):
    """Computed once; anew where the file is damaged, the pictures are others, or the network answers otherwise."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3), np.uint8)
    batches, factor = [], 1.0

    def features(some):
        batches.append(len(some))
        return some.reshape(len(some), -1).astype(np.float32) * factor

    extractor = Extractor("a name", "a hash", features)
    expected = pictures.reshape(70, -1).astype(np.float32)

    def looked(at, wanted):
        batches.clear()
        assert np.array_equal(extractor.of_known(at), wanted)
        return len(batches)

    assert [looked(pictures, expected) for _ in range(2)] == [3, 1]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert [looked(pictures, expected) for _ in range(2)] == [3, 1]
    assert [looked(pictures[::-1], expected[::-1]) for _ in range(2)] == [3, 1]
    assert looked(pictures[:20], expected[:20]) == 1
    factor = 2.0
    assert [looked(pictures, 2 * expected) for _ in range(2)] == [3, 1]
    extractor = Extractor("a name", "another hash", features)
    assert looked(pictures, 2 * expected) == 3
    monkeypatch.setenv("LATENTDIFF_CACHE", "/proc/nothing")
    assert [looked(pictures, 2 * expected) for _ in range(2)] == [3, 3]


def test_composition_of_the_tiny_model_is_read_from_its_pictures(whole_report, tiny_model):
    """The command's figures are those of the function, with errors over prompts."""
    from latentdiff.evaluation.composition import evaluate_composition

    folder, _ = whole_report
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")
    score = evaluate_composition(pipe.painter, pictures=4, seed=0, num_inference_steps=2)
    assert figures(folder, "composition")["composition"] == score.overall


def test_scenes_that_a_model_of_things_has_not_seen(call, tiny_model):
    """It is measured on scenes of shapes alone, of which it was trained on none: nothing says what it remembers."""
    copy = Path(shutil.copytree(tiny_model, "things"))
    (copy / "things.json").write_text(json.dumps({"food": ["apple", "red apple"]}))
    code, _, err = call("evaluate", copy, *QUICK, "--only", "memorisation", "-o", "out")
    assert (code, "memorisation cannot be measured: no pictures are known" in err) == (2, True), err
    code, _, err = call("evaluate", tiny_model, *QUICK, "--only", "memorisation", "-o", "out")
    assert code == 0, err
