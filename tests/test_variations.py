"""`--vary`, `--grid` and `--steps-gif`: pictures of every combination, shown together, and the way to each."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from latentdiff.drawing import sheet
from latentdiff.drawing.sheet import CELL, GAP, animation, grid


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def options(*more):
    return ("generate", "a red circle", "-m", "{model}", "--steps", 2, *more)


@pytest.fixture
def draw(call, tiny_model):
    """The command on the tiny model: exit code, lines on stdout, stderr."""

    def picture_of(*words):
        code, out, err = call(*(str(word).replace("{model}", str(tiny_model)) for word in words))
        return code, out.split(), err

    return picture_of


def test_every_combination_is_what_it_is_alone(draw):
    """The same seeds under each; the last setting changes first."""
    code, paths, err = draw(
        *options("-s", 3, "-N", 2, "--vary", "cfg=1,4", "--vary", "sampler=ddim,euler", "-o", "out")
    )
    assert (code, [path[-11:] for path in paths]) == (0, [f"{n:05}-{3 + (n - 1) % 2}.png" for n in range(1, 9)]), err
    assert len(paths) == 8
    for number, (cfg, sampler) in enumerate([(1, "ddim"), (1, "euler"), (4, "ddim"), (4, "euler")]):
        code, alone, err = draw(*options("-s", 3, "-N", 2, "--cfg", cfg, "--sampler", sampler, "-o", f"alone{number}"))
        assert code == 0, err
        for ours, theirs in zip(paths[2 * number :][:2], alone, strict=True):
            assert np.array_equal(pixels(ours), pixels(theirs))


def test_seeds_of_several_prompts(draw, tmp_path):
    """Each prompt goes on counting, as without variations; without a seed all variations share a random one."""
    (tmp_path / "p.txt").write_text("a ring\na star\n")
    words = ("generate", "--prompts-file", "p.txt", "-m", "{model}", "--steps", 1, "--vary", "cfg=1,2", "-o", "out")
    _, paths, _ = draw(*words, "-s", 5, "-N", 2)
    assert [int(path[-5]) for path in paths] == [5, 6, 5, 6, 7, 8, 7, 8]
    _, paths, _ = draw(*words)
    seeds = [int(path.rpartition("-")[2][:-4]) for path in paths]
    assert (seeds[0], seeds[2], seeds[3]) == (seeds[1], seeds[0] + 1, seeds[0] + 1)


def test_the_grid_shows_every_picture(draw):
    """Columns are the last setting's values; each cell is its picture, enlarged by pixels, and nothing else."""
    code, paths, err = draw(*options("-s", 3, "--vary", "cfg=1,4", "--vary", "steps=1,2,3", "--grid", "-o", "out"))
    assert code == 2, "steps are given twice"
    words = [word for word in options("-s", 3, "--vary", "cfg=1,4", "--vary", "steps=1,2,3", "--grid", "-o", "out")]
    del words[4:6]
    code, paths, err = draw(*words)
    assert (code, len(paths), paths[-1]) == (0, 7, "out/grid-00001.png"), err
    made, factor = pixels(paths[-1]), CELL // 64
    left, top = CELL, made.shape[0] - 2 * (CELL + GAP) - GAP
    assert made.shape[1] == left + 3 * (CELL + GAP) + GAP
    for number, path in enumerate(paths[:6]):
        y, x = top + GAP + number // 3 * (CELL + GAP), left + GAP + number % 3 * (CELL + GAP)
        expected = pixels(path).repeat(factor, 0).repeat(factor, 1)
        assert np.array_equal(made[y : y + CELL, x : x + CELL], expected)
    assert (made[:top, left:] < 128).any(), "names above"
    assert (made[top:, :left] < 128).any(), "names beside"
    assert draw(*words)[1][-1] == "out/grid-00002.png"


def test_rows_and_columns_of_a_grid_are_named(draw, monkeypatch):
    """Without settings a prompt's columns are its seeds; with them the seeds stand beside the rows."""
    picture_of = []
    monkeypatch.setattr(sheet, "grid", lambda *names: picture_of.append(names[1:]) or grid(*names))
    plain = [word for word in options("-s", 3, "-N", 2, "--grid", "-o", "a")]
    assert draw(*plain)[0] == 0
    assert draw(*options("-s", 3, "-N", 2, "--vary", "cfg=1,4", "--vary", "eta=0,1", "--grid", "-o", "b"))[0] == 0
    assert picture_of[0] == (["seed 3", "seed 4"], [""])
    names = [f"guidance_scale {cfg}, seed {seed}" for cfg in ("1", "4") for seed in (3, 4)]
    assert (picture_of[1][0], sorted(picture_of[1][1])) == (["eta 0", "eta 1"], names)


def test_long_names_do_not_run_into_the_next_row():
    cells = [[Image.new("RGB", (256, 40), color)] for color in ("red", "blue")]
    flat = np.asarray(grid(cells, [""], ["many words " * 12, ""]))
    assert flat.shape[0] > 2 * (40 + GAP) + GAP + 60


def test_pictures_of_several_sizes_stand_in_the_middle():
    small, large = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (300, 200), "blue")
    made = np.asarray(grid([[small, large]], ["", ""], [""]))
    assert made.shape == (200 + 2 * GAP, 2 * 300 + 3 * GAP, 3)
    assert (made[GAP + 50 : GAP + 150, GAP + 50 : GAP + 250] == (255, 0, 0)).all()
    assert (made[GAP : GAP + 50, GAP : GAP + 300] == 255).all()


def test_the_way_from_noise(draw):
    """A frame a step; the last one is the picture, up to the palette."""
    code, paths, err = draw(*options("-s", 3, "-N", 2, "--steps-gif", "-o", "out"))
    assert code == 0, err
    for path in paths:
        with Image.open(path.replace(".png", ".gif")) as made:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(made)]
        assert len(frames) == 2
        last = frames[-1].astype(int)
        assert np.abs(last - pixels(path)).mean() < 6
    assert not np.array_equal(pixels(paths[0].replace("png", "gif")), pixels(paths[1].replace("png", "gif")))


def test_a_missing_animation_is_drawn_again(draw):
    """--resume draws a picture whose animation is missing; an animation without its picture is somebody else's."""
    words = options("-s", 3, "--steps-gif", "--resume", "-o", "out")
    (path,) = draw(*words)[1]
    before = Path(path).read_bytes(), Path(path.replace(".png", ".gif")).read_bytes()
    Path(path.replace(".png", ".gif")).unlink()
    code, paths, err = draw(*words)
    assert (code, paths) == (0, []), err
    assert (Path(path).read_bytes(), Path(path.replace(".png", ".gif")).read_bytes()) == before
    Path(path).unlink()
    code, paths, err = draw(*words)
    assert (code, paths, "00001-3.gif). Pictures are never overwritten" in err) == (2, [], True), err
    code, paths, err = draw(*options("-s", 3, "--steps-gif", "-o", "out"))
    assert (code, paths) == (0, [path.replace("00001", "00002")]), err


def test_animations_of_many_steps_and_of_two_passes():
    """At most sixty frames, the first and the last among them; frames of a smaller pass are enlarged."""
    frames = [np.full((8, 8, 3), value, np.uint8) for value in range(0, 200)] + [np.full((16, 16, 1), 255, np.uint8)]
    made = Image.open(io.BytesIO(animation(frames)))
    assert (made.n_frames, made.size) == (60, (16, 16))
    values = [int(np.asarray(frame.convert("L")).max()) for frame in ImageSequence.Iterator(made)]
    assert (values[0], values[-1]) == (0, 255)
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vary", "cfg"), "--vary must be NAME=VALUE,VALUE, each name once (got 'cfg')"),
        (("--vary", "cfg=1", "--vary", "guidance_scale=2"), "each name once"),
        (("--vary", "cfg=1,x"), "guidance_scale: must be a number (got 'x')"),
        (("--vary", "cfg=1", "--cfg", 3), "--vary guidance_scale: it is given elsewhere"),
        (("--vary", "num_images=1,2"), "--vary num_images: it is given elsewhere, or does not change pictures"),
        (("--vary", "batch_size=1,2"), "does not change pictures"),
        (("--vary", "cfg=1,2", "--set", "seed=abc"), "seed must be a whole number (got 'abc')"),
        (("--vary", "prompt=a,b"), "the prompt is an argument"),
        (("--vary", f"seed={','.join(map(str, range(2000)))}"), "gives 2,000 combinations of settings. At most 1,000"),
        (("--vary", "cfg=1,2", "--resume"), "--resume requires --seed"),
        (("--grid", "--resume", "-s", 1), "--grid requires all pictures of one command in a folder"),
        (("--grid", "-o", "a.png"), "--grid requires all pictures of one command in a folder"),
        (("--grid", "-N", 500), "at most 400 in all"),
        (("--steps-gif", "-o", "there.png"), "file exists (there.gif)"),
    ],
)
def test_refused(draw, tmp_path, words, message):
    (tmp_path / "there.gif").write_bytes(b"")
    code, out, err = draw("generate", "a ring", "-m", "nowhere", *words)
    assert (code, out, err.count("\n")) == (2, [], 1)
    assert message in err
