"""Consistency distillation: closed forms on Gaussian data, and the method from the command to few steps."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from PIL import Image

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.consistency import ConsistencyLoss
from latentdiff.diffusion.easy_consistency import LOG_MEAN, LOG_STD, EasyConsistencyLoss
from latentdiff.diffusion.jump import clean_level, columns, ratio_difference, table
from latentdiff.diffusion.jump import jump as jumped
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS, boundary, parametrization_named
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.times import Times
from latentdiff.drawing.presets import PRESETS
from latentdiff.settings.finetuning import load_finetuning

from . import stable_diffusion
from .forked import Started
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load

STD, MEAN = 0.6, 0.4
PATHS = {"epsilon": VariancePreserving.scaled_linear(), "v_prediction": VariancePreserving.cosine(), "flow": Straight()}


def exact(path, prediction, std=STD, mean=MEAN):
    """The network of Gaussian data: E[x0 | x_t] = mean + g (x - alpha mean), g = alpha std^2 / Var[x_t]."""

    def network(x, time, conditions):
        outputs = []
        for row, t in zip(x, time.tolist() if hasattr(time, "tolist") else [time] * len(x), strict=True):
            level, shift = path.level(t), mean if conditions is None else conditions
            gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
            c = parametrization_named(prediction)(level)
            x0 = shift + gain * (row - level.alpha * shift)
            outputs.append((x0 - c.skip * row) / c.out)
        return torch.stack(outputs)

    return network


def jump(x, level, std=STD, mean=MEAN):
    """The end of the probability flow of Gaussian data: the standardised value stays."""
    return mean + std * (x - level.alpha * mean) / math.sqrt(level.alpha**2 * std**2 + level.sigma**2)


def rows(loss, numbers):
    """The rows of places in the grid and of their neighbours, (B, 2, 8)."""
    return torch.stack([loss._table[number : number + 2] for number in numbers])


class Solution(torch.nn.Module):
    """A student that is the exact consistency function."""

    def __init__(self, path, prediction):
        super().__init__()
        self.path, self.prediction = path, prediction

    def forward(self, x, time, conditions):
        outputs = []
        for row, t in zip(x, time.tolist(), strict=True):
            level = self.path.level(t)
            c, (c_skip, c_out) = parametrization_named(self.prediction)(level), boundary(t)
            x0 = (jump(row, level) - c_skip * row) / c_out if c_out else row
            outputs.append((x0 - c.skip * row) / c.out)
        return torch.stack(outputs)


@pytest.mark.parametrize("prediction", PATHS)
def test_the_solution_has_no_loss(prediction):
    """As the steps of the teacher's solver become small: its error is of second order, the weight of first."""
    path = PATHS[prediction]
    x0 = MEAN + STD * torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    errors = []
    for steps in (25, 50, 100):
        loss = ConsistencyLoss(path, prediction, steps=steps, guidance=1.0, huber=1e-5)
        number = torch.arange(4096) % (steps - 1) + (1 if prediction == "epsilon" else 0)
        value = loss(Solution(path, prediction), exact(path, prediction), x0, noise, rows(loss, number), None, None)
        errors.append(float(value.mean()))
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3
    wrong = loss(exact(path, prediction), exact(path, prediction), x0, noise, rows(loss, number), None, None)
    assert wrong.mean() > 5 * errors[2], "the denoiser itself is not the solution"


def test_guidance_is_inside():
    """The teacher's step is along the guided direction: with data at two means the path of the extrapolated one."""
    path, prediction = PATHS["v_prediction"], "v_prediction"
    loss = ConsistencyLoss(path, prediction, steps=50, guidance=3.0, huber=1e-4)
    x0, noise = torch.zeros(1, 1), torch.ones(1, 1)
    seen = {}

    def student(x, time, conditions):
        seen.setdefault("x", []).append(x.detach().clone())
        return 0 * x

    loss(student, exact(path, prediction), x0, noise, rows(loss, [10]), 1.0, 0.0)
    levels = [*path.levels(50, "distilled")[:-1], path.numbered(0)]
    t, s = levels[10], levels[11]
    x = t.sigma * torch.ones(1, 1)
    denoised = [
        shift + (t.alpha * STD**2 / (t.alpha**2 * STD**2 + t.sigma**2)) * (x - t.alpha * shift) for shift in (0.0, 1.0)
    ]
    guided = denoised[0] + 3 * (denoised[1] - denoised[0])
    expected = s.alpha * guided + s.sigma * (x - t.alpha * guided) / t.sigma
    assert torch.allclose(seen["x"][0], expected, atol=1e-6), "the goal is taken a step nearer to the data"
    assert torch.allclose(seen["x"][1], x, atol=1e-6)


def test_the_last_goal_is_the_data_itself():
    loss = ConsistencyLoss(PATHS["epsilon"], "epsilon", steps=10, guidance=1.0, huber=1e-3)
    assert loss._table[-1][-2:].tolist() == [1.0, 0.0]
    assert [loss.number(t) for t in (999, 950, 900, 99, 0)] == [0, 0, 0, 9, 9]
    assert torch.equal(loss.rows(950), loss._table[:2])


def test_every_time_has_the_level_at_or_above_it():
    """Also where the path's shift has moved both: the times of a training are drawn shifted."""
    path = Straight(3.0)
    loss, grid = ConsistencyLoss(path, "flow", steps=8, guidance=1.0, huber=1e-3), path.levels(8, "trailing")
    rng, times = np.random.default_rng(0), Times(path)
    drawn = [(t, loss.number(t)) for t in (times.draw(rng) for _ in range(4000))]
    assert all(grid[number].t >= t > grid[number + 1].t for t, number in drawn)
    counts = np.bincount([number for _, number in drawn], minlength=8)
    assert np.abs(counts - 500).max() < 5 * 500**0.5


@pytest.mark.parametrize("prediction", PARAMETRIZATIONS)
def test_a_jump_from_the_end_is_the_data(prediction):
    """Whatever the network computes there; its time is finite."""
    rows = table([clean_level(Straight())], prediction)
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    network = lambda x, time, _: x + torch.sin(time)[:, None]  # noqa: E731
    assert torch.equal(jumped(network, x, columns(rows, x), None), x)


@pytest.mark.slow
def test_a_student_learns_it():
    """Trained from the teacher's weights it jumps in one step where the teacher is a standard deviation away."""
    path, prediction = PATHS["v_prediction"], "v_prediction"
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
    )

    def student(x, time, conditions):
        scaled = time[:, None] / 500 - 1
        return net(torch.cat([x, scaled, scaled**2], 1))

    teacher, loss = exact(path, prediction), ConsistencyLoss(path, prediction, steps=20, guidance=1.0, huber=1e-2)
    levels = torch.tensor([[lv.alpha, lv.sigma, lv.t] for lv in [*path.levels(20, "distilled")[:-1], path.numbered(0)]])
    gain = levels[:, 0] * STD**2 / (levels[:, 0] ** 2 * STD**2 + levels[:, 1] ** 2)

    def quick(x, time, conditions):
        index = (levels[None, :, 2] - time[:, None]).abs().argmin(1)
        alpha, sigma, g = levels[index, 0, None], levels[index, 1, None], gain[index, None]
        x0 = MEAN + g * (x - alpha * MEAN)
        return (alpha * x - x0) / sigma

    assert torch.allclose(
        quick(torch.ones(3, 1), levels[:3, 2], None), teacher(torch.ones(3, 1), levels[:3, 2], None), atol=1e-5
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        x0 = MEAN + STD * torch.randn(256, 1, generator=generator)
        number = torch.randint(20, (256,), generator=generator)
        noise = torch.randn(256, 1, generator=generator)
        value = loss(student, quick, x0, noise, rows(loss, number), None, None).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(4000, 1, generator=generator)
    with torch.no_grad():

        def denoise(x, level):
            c = parametrization_named(prediction)(level)
            return c.skip * x + c.out * student(x, torch.full((len(x),), level.t), None)

        (step,) = SAMPLERS["lcm"].walk(denoise, x, path.levels(1, "distilled"))
    picture = np.asarray(step.x)
    assert abs(picture.mean() - MEAN) < 0.05
    assert abs(picture.std() - STD) < 0.08
    top = path.levels(1, "distilled")[0]
    collapsed = MEAN + (top.alpha * STD**2 / (top.alpha**2 * STD**2 + top.sigma**2)) * (x.numpy() - top.alpha * MEAN)
    assert collapsed.std() < 0.1 * STD, "the teacher in one step draws the mean"


def easy_rows(loss, times):
    return torch.stack([loss.rows(float(t)) for t in times])


@pytest.mark.parametrize("prediction", PATHS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tuning_has_no_loss_at_the_solution(prediction, guidance):
    """For data without spread the consistency function is known at every level: it is the data.

    With guidance the data of the prompt are at 1 and those without at 0: the guided path ends at the scale.
    """
    path = PATHS[prediction]
    loss = EasyConsistencyLoss(path, prediction, shrink=16, guidance=guidance, huber=1e-3)
    x0, noise = torch.ones(64, 2), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    times = np.linspace(path.T / 10, path.T - 1, 64).astype(int)
    levels = easy_rows(loss, times)

    def solution(x, time, mean):
        outputs = []
        for row, t in zip(x, time.tolist(), strict=True):
            c, (c_skip, c_out) = parametrization_named(prediction)(path.level(t)), boundary(t)
            outputs.append(((guidance * mean - c_skip * row) / c_out - c.skip * row) / c.out)
        return torch.stack(outputs)

    zero = exact(path, prediction, std=0.0, mean=0.0)
    value = loss(solution, zero, x0, noise, levels, 1.0, None)
    off = loss(lambda *given: 1.02 * solution(*given), zero, x0, noise, levels, 1.0, None)
    assert value.max() < 1e-2 * off.mean()


def test_the_weight_of_a_pair():
    """1 / (r_t - r_s), which a path without signal at its end has too."""
    path = VariancePreserving.cosine().zero_terminal_snr()
    loss = ConsistencyLoss(path, "v_prediction", steps=50, guidance=1.0, huber=1e-4)
    for number in (0, 1, 25, 49):
        at, after = (columns(each, torch.zeros(1, 1)) for each in rows(loss, [number]).unbind(1))
        high, low = (float(each.sigma / each.alpha) for each in (at, after))
        assert float(ratio_difference(at, after)) == pytest.approx(min(high, 80) - min(low, 40), rel=1e-5)
    assert number == 49
    assert low == 0


@pytest.mark.parametrize("prediction", PATHS)
def test_levels_of_tuning(prediction):
    """r_s = r_t (1 - n / q) with the same x0 and noise; at q = n it is the data, and the loss that of diffusion."""
    path = PATHS[prediction]
    loss = EasyConsistencyLoss(path, prediction, shrink=256, guidance=1.0, huber=1e-3)
    for t in (400.0, 900.0):
        at, after = loss.rows(t)
        ratio = float(at[1] / at[0])
        n = 1 + 8 / (1 + math.exp(ratio))
        assert float(after[1] / after[0]) == pytest.approx(ratio * (1 - n / 256), rel=1e-4)
        assert float(after[2]) < t
    seen = []

    def student(x, time, conditions):
        seen.append(x.detach().clone())
        return 0 * x

    x0, noise = torch.randn(1, 3), torch.randn(1, 3)
    levels = easy_rows(loss, [400])
    loss(student, None, x0, noise, levels, None, None)
    scale = levels[0, 1, 3]
    assert torch.allclose(seen[0], scale * (levels[0, 1, 0] * x0 + levels[0, 1, 1] * noise), atol=1e-5)
    guided = EasyConsistencyLoss(path, prediction, shrink=256, guidance=3.0, huber=1e-3)
    guided(student, exact(path, prediction, std=0.0), x0, noise, levels, None, None)
    at, after = levels[0]
    goal = MEAN + 3 * (x0 - MEAN)  # without a prompt the data are at the mean
    x = at[0] * x0 + at[1] * noise
    nearer = after[0] * goal + after[1] * (x - at[0] * goal) / at[1]
    assert torch.allclose(seen[2], scale * nearer, atol=1e-3)
    whole = EasyConsistencyLoss(path, prediction, shrink=1, guidance=1.0, huber=1e-3).rows(400)
    assert whole[1, :2].tolist() == [1.0, 0.0]
    if path.has_integer_times:
        assert whole[1, -2:].tolist() == [1.0, 0.0], "f is the identity there"


@pytest.mark.parametrize(
    ("path", "prediction", "end"),
    [(Straight(), "flow", 1000), (VariancePreserving.cosine().zero_terminal_snr(), "v_prediction", 999)],
)
def test_the_end_of_a_path_without_signal(path, prediction, end):
    """There the ratio is taken to be 80, EDM's largest."""
    loss = EasyConsistencyLoss(path, prediction, shrink=256, guidance=1.0, huber=1e-3)
    at, after = loss.rows(end)
    assert float(at[0]) == pytest.approx(0, abs=1e-6)
    assert float(after[1] / after[0]) == pytest.approx(80 * (1 - 1 / 256), rel=1e-3)
    x0 = torch.ones(1, 2)
    value = loss(lambda x, time, conditions: x, None, x0, x0, torch.stack([at, after])[None], None, None)
    assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency.objective": "ect", "consistency.steps": 20}, "steps has no effect"),
        ({"consistency.shrink": 20}, "shrink has no effect"),
        ({"consistency.objective": "ect", "finetune.times": "logit_normal"}, "has its own times"),
        ({"consistency.objective": "dmd"}, "must be 'lcm', 'ect' or 'mean-flow'"),
        ({"consistency.objective": "ect", "consistency.shrink": 1}, "shrink"),
    ],
)
def test_settings_without_effect(settings, message):
    given = {"method": "consistency", "data.kind": "pictures", "data.pictures.source": "photos", **settings}
    with pytest.raises(ConfigError, match=message):
        load_finetuning(None, tuple(given.items()))


def test_times_of_tuning():
    """The logarithms of the ratios are normal where the path has them."""
    with pytest.raises(ValueError, match="times must be one of uniform, logit_normal, log_normal"):
        Times(Straight(), "lognormal")
    times = Times(Straight(), "log_normal", LOG_MEAN, LOG_STD)
    rng = np.random.default_rng(0)
    picture = np.array([times.draw(rng) for _ in range(20_000)]) / 1000
    logs = np.log(picture / (1 - picture))
    assert abs(logs.mean() - LOG_MEAN) < 0.05
    assert abs(logs.std() - LOG_STD) < 0.05
    whole = Times(VariancePreserving.cosine(), "log_normal", LOG_MEAN, LOG_STD)
    assert all(isinstance(whole.draw(rng), np.int64) for _ in range(10))


@pytest.mark.slow
def test_a_student_is_tuned():
    """From the data alone it comes to draw them in one step: their mean and their spread."""
    path, prediction = PATHS["flow"], "flow"
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
    )

    def student(x, time, conditions):
        share = time[:, None] / 1000
        return net(torch.cat([x, share, share**2], 1))

    loss = EasyConsistencyLoss(path, prediction, shrink=8, guidance=1.0, huber=0.03)
    known = [loss.rows(t) for t in np.linspace(1, 1000, 500)]
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        x0 = MEAN + STD * torch.randn(256, 1, generator=generator)
        chosen = torch.stack([known[i] for i in torch.randint(500, (256,), generator=generator).tolist()])
        value = loss(student, None, x0, torch.randn(256, 1, generator=generator), chosen, None, None).mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x = torch.randn(4000, 1, generator=generator)
    with torch.no_grad():
        picture = x - student(x, torch.full((4000,), 1000.0), None)
    assert abs(float(picture.mean()) - MEAN) < 0.06
    assert abs(float(picture.std()) - STD) < 0.12


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny Stable Diffusion, distilled for three steps of training."""
    folder = tmp_path_factory.mktemp("student")
    stable_diffusion.pipeline("1").save_pretrained(folder / "teacher")
    as_jsonl(folder / "pictures", some_pictures(6, 64))
    words = ("--method", "consistency", "--steps", 3, "--train-batch-size", 2, "--lr", 1e-3, "--validation-steps", 3)
    words += ("--set", "previews.count=1", "--set", "previews.num_inference_steps=1", "--resolution", 64)
    command = ("finetune", folder / "teacher", folder / "pictures", "-o")
    for name, more in (("full", ()), ("factors", ("--rank", 2))):
        code, err = Started(*command, folder / name, *words, *more).ended()
        assert code == 0, err
    return folder


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "np"}


@pytest.mark.slow
def test_beside_its_teacher(student):
    """The report shows both from the same noise: the last row's first picture is the student's in one step."""
    sheet = np.asarray(Image.open(student / "full" / "few-steps.png"))
    assert sheet.shape == (128, 256, 3)
    assert "few-steps.png" in (student / "full" / "README.md").read_text()
    (prompt,) = json.loads(Image.open(student / "full" / "few-steps.png").text["Description"])["prompts"]
    options = {"prompt": prompt, "seed": 0, "height": 64, "width": 64, "output_type": "uint8"}
    teacher, own = load(student / "teacher"), load(student / "full" / "model")
    for column, count in enumerate((1, 2, 4, 8)):
        for row, pipe in enumerate((teacher, own)):
            picture = pipe(num_inference_steps=count, **options).images[0].astype(int)
            view = sheet[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            assert np.abs(picture - view).max() <= 1


@pytest.mark.slow
def test_diffusers_draws_the_student(student):
    """By the scheduler that the folder names, from the same latents and noise."""
    theirs = StableDiffusionPipeline.from_pretrained(student / "full" / "model", requires_safety_checker=False)
    assert isinstance(theirs.scheduler, LCMScheduler)
    ours = load(student / "full" / "model")
    assert {**ours.card.defaults} | PRESETS["lcm"] == {**ours.card.defaults}
    teacher = load(student / "teacher")
    picture = []
    for pipe in (theirs, ours):
        noise = torch.Generator().manual_seed(2)
        latents = torch.randn(1, 4, 8, 8, generator=noise)
        picture.append(pipe("a star", latents=latents, generator=noise, **OPTIONS).images)
    assert np.abs(picture[0] - picture[1]).max() < 1e-4
    noise = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 8, 8, generator=noise)
    before = teacher("a star", latents=latents, generator=noise, preset="lcm", height=64, width=64, output_type="np")
    assert np.abs(before.images - picture[1]).max() > 1e-4, "it has learnt"


@pytest.mark.slow
def test_its_factors_are_an_lcm_lora(student):
    theirs = StableDiffusionPipeline.from_pretrained(student / "teacher", requires_safety_checker=False)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(student / "factors", weight_name="pytorch_lora_weights.safetensors")
    ours = load(student / "teacher")
    ours.load_lora_weights(student / "factors")
    picture = []
    for pipe, more in ((theirs, {}), (ours, {"preset": "lcm"})):
        noise = torch.Generator().manual_seed(2)
        latents = torch.randn(1, 4, 8, 8, generator=noise)
        picture.append(pipe("a star", latents=latents, generator=noise, **OPTIONS, **more).images)
    assert np.abs(picture[0] - picture[1]).max() < 1e-4
