"""A run: resumed to the bit, reports that change nothing, signals, warnings."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.core.errors import Interrupted, ModelError
from latentdiff.training.checkpoint import checkpoints, newest_whole

from .small import LineStage, PictureStage, denoiser_stage, logged, run


class KilledError(Exception):
    pass


def final(directory):
    """Every tensor of the newest checkpoint."""
    folder = checkpoints(directory / "checkpoints")[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one, other):
    expected, result = final(one), final(other)
    assert expected.keys() == result.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, result[name]), name


def stopping(stage, position):
    """The stage, until the batch that begins at `position`."""
    original = stage.batch

    def batch(positions):
        if positions.start == position:
            raise KilledError
        return original(positions)

    stage.batch = batch
    return stage


STAGES = {"line": LineStage, "channels_last": PictureStage, "denoiser": lambda: denoiser_stage(caption_dropout=0.2)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon"},
        {"optimizer": "adamw", "ema": "power", "lr_schedule": "cosine", "gradient_accumulation_steps": 3},
    ],
    ids=["adamw", "muon", "accumulated"],
)
def test_stopped_and_resumed_is_bitwise_the_same(tmp_path, stage, settings):
    """Weights, averages and optimizer states, in whatever order of memory; each step is logged once."""
    times = settings.get("gradient_accumulation_steps", 1)
    run(tmp_path / "whole", STAGES[stage](), learning_rate=0.01, **settings)
    for position in (15 * 8 * times, 34 * 8 * times + 8 * (times - 1)):
        with pytest.raises(KilledError):
            newest, _ = newest_whole(tmp_path / "parts" / "checkpoints")
            run(tmp_path / "parts", stopping(STAGES[stage](), position), None, newest, learning_rate=0.01, **settings)
    newest, _ = newest_whole(tmp_path / "parts" / "checkpoints")
    assert newest.name == "step-00000030"
    run(tmp_path / "parts", STAGES[stage](), None, newest, learning_rate=0.01, **settings)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    parts, whole = logged(tmp_path / "parts"), logged(tmp_path / "whole")
    assert [row["step"] for row in parts] == list(range(1, 41))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]


def test_reports_change_nothing(tmp_path):
    """They see the averaged weights; the run goes on with its own."""
    stage, seen = PictureStage(), []

    def report(step):
        seen.append(next(stage.module.parameters()).detach().clone())
        torch.randn(3)
        return {"quality": 1.0}

    run(tmp_path / "with", stage, report, validation_steps=3)
    run(tmp_path / "without", PictureStage())
    assert_same(tmp_path / "with", tmp_path / "without")
    assert [row["step"] for row in logged(tmp_path / "with") if "quality" in row] == [*range(3, 40, 3), 40]
    assert torch.equal(seen[-1], final(tmp_path / "with")["ema/0.weight"])


def test_the_average_is_what_is_left(tmp_path):
    stage = run(tmp_path, PictureStage())
    result = final(tmp_path)
    for name, parameter in stage.module.named_parameters():
        assert torch.equal(parameter, result[f"ema/{name}"])
        assert not torch.equal(parameter, result[f"network/{name}"])


def test_a_run_that_is_longer_goes_on(tmp_path):
    run(tmp_path, max_train_steps=20)
    newest, _ = newest_whole(tmp_path / "checkpoints")
    run(tmp_path, checkpoint=newest)
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, 41))


def test_a_log_line_cut_off_is_dropped(tmp_path):
    run(tmp_path, max_train_steps=20)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(
            '{"step": 20, "lo\n{}\nxx}\n' + "[" * 100_000 + '\n{"step": -Infinity}\n{"step": 1' + 400 * "0" + "}\n"
        )
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b"\xff\xfe\x00\n")
    newest, _ = newest_whole(tmp_path / "checkpoints")
    run(tmp_path, checkpoint=newest)
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, 41))


def test_a_report_that_fails_loses_nothing_and_is_made_again(tmp_path):
    def failing(step):
        raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path, report=failing)
    newest, _ = newest_whole(tmp_path / "checkpoints")
    assert newest.name == "step-00000040"
    for _ in range(2):
        run(tmp_path, report=lambda step: {"quality": 2.0}, checkpoint=newest)
    assert [row for row in logged(tmp_path) if "quality" in row] == [{"step": 40, "quality": 2.0}]


def test_going_back_puts_newer_checkpoints_aside(tmp_path):
    """Else they would be taken for this run's newest, which they need not be."""
    run(tmp_path)
    run(tmp_path, checkpoint=tmp_path / "checkpoints" / "step-00000030", max_train_steps=33)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["aside-1-step-00000040", "step-00000030", "step-00000033"]
    lines = (tmp_path / "checkpoints" / names[0] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41)), "its log lies beside it"


@pytest.mark.parametrize("name", ["copy", "aside-1-step-00000030", "zcopy"])
def test_the_name_of_a_checkpoint_says_nothing(tmp_path, name):
    """Put aside are those of this run that are at its step or later; what is saved next stays."""
    run(tmp_path, max_train_steps=20)
    newest, _ = newest_whole(tmp_path / "checkpoints")
    run(tmp_path, checkpoint=newest)
    path = (tmp_path / "checkpoints" / "step-00000030").rename(tmp_path / "checkpoints" / name)
    with pytest.raises(Interrupted, match="saved step-32"):
        run(tmp_path, signalling(LineStage(), 2, signal.SIGTERM), checkpoint=path, signals=True)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert names == sorted([name, "aside-1-step-00000040", "step-00000032"])


def test_going_on_from_another_run_leaves_that_as_it_is(tmp_path):
    run(tmp_path / "one")
    before = sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())
    run(tmp_path / "two", checkpoint=tmp_path / "one" / "checkpoints" / "step-00000030", max_train_steps=35)
    assert sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir()) == before
    assert [row["step"] for row in logged(tmp_path / "two")] == list(range(31, 36))


def test_a_stage_knows_what_it_was_trained_on(tmp_path):
    run(tmp_path, identity={"made_from": "one autoencoder"})
    newest, _ = newest_whole(tmp_path / "checkpoints")
    with pytest.raises(ModelError, match="belongs to other networks"):
        run(tmp_path, checkpoint=newest, identity={"made_from": "another"})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (PictureStage, "checkpoint has ema, line, optimizer; the run requires ema, network, optimizer"),
        (lambda: widened(LineStage()), r"checkpoint belongs to another network: line weight is \(1, 1\), not \(2, 1\)"),
    ],
)
def test_a_checkpoint_of_another_network(tmp_path, stage, message):
    run(tmp_path)
    newest, _ = newest_whole(tmp_path / "checkpoints")
    with pytest.raises(ModelError, match=message):
        run(tmp_path, stage(), checkpoint=newest)


def widened(stage):
    stage.module = torch.nn.Linear(1, 2)
    stage.parts = {"line": stage.module}
    return stage


def test_batches_split_otherwise_are_told_and_the_same(tmp_path, capsys):
    """8 at once, then 2 x 4: the same samples, within rounding; one warning."""
    run(tmp_path / "whole")
    run(tmp_path / "split", max_train_steps=20, lr_decay=0.15)
    newest, _ = newest_whole(tmp_path / "split" / "checkpoints")
    capsys.readouterr()
    run(tmp_path / "split", checkpoint=newest, train_batch_size=4, gradient_accumulation_steps=2)
    warnings = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("warning")]
    assert len(warnings) == 1
    assert "the same samples, sums rounded otherwise" in warnings[0]
    state = json.loads((tmp_path / "split" / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert state["position"] == 320


def signalling(stage, call, *numbers):
    """The stage, sending itself signals at a call of its loss."""
    original, calls = stage.loss, [0]

    def loss(module, batch):
        calls[0] += 1
        if calls[0] == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(module, batch)

    stage.loss = loss
    return stage


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_in_hand(tmp_path, number, code):
    """Whatever the checkpoints' interval; to go on from there is bitwise the same. A launcher's echo is one wish."""
    run(tmp_path / "whole", PictureStage())
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "parts", signalling(PictureStage(), 17, number, signal.SIGTERM), signals=True)
    assert (str(stopped.value), stopped.value.exit_code) == (f"saved step-17 after {number.name}", code)
    newest, _ = newest_whole(tmp_path / "parts" / "checkpoints")
    assert newest.name == "step-00000017"
    run(tmp_path / "parts", PictureStage(), checkpoint=newest)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_ends_a_report_at_once_and_saves(tmp_path):
    run(tmp_path / "whole", PictureStage())
    stage = PictureStage()

    def report(step):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the report went on")

    with pytest.raises(Interrupted, match="saved step-7 after SIGTERM"):
        run(tmp_path / "parts", stage, report, signals=True, validation_steps=7)
    newest, _ = newest_whole(tmp_path / "parts" / "checkpoints")
    run(tmp_path / "parts", PictureStage(), checkpoint=newest)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(tmp_path, signals=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_tensorboard_has_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, report=lambda step: {"quality": step / 2}, validation_steps=20)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [row for row in logged(tmp_path) if "loss" in row]
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in lines]
    assert [(event.step, event.value) for event in events.Scalars("validation/quality")] == [(20, 10), (40, 20)]
