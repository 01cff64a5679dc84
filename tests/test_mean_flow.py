"""Mean flows: the average velocity of data that are normal is known, and one step along it draws them."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.diffusion import mean_flow
from latentdiff.diffusion.mean_flow import MeanFlowLoss
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.networks.averaging import WithStepEnds, averaging
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.settings.finetuning import load_finetuning

from . import stable_diffusion
from .forked import Started
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load

MEAN, STD = 0.7, 0.4  # of the data


def spread(t):
    """The deviation of x_t."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def average(x, r, t):
    """u(x_t, r, t) of normal data, by the flow x_r = mean_r + std_r / std_t (x_t - mean_t); at r = t the velocity."""
    ahead = (1 - r) * MEAN + spread(r) / spread(t) * (x - (1 - t) * MEAN)
    velocity = -MEAN + (t - (1 - t) * STD**2) / spread(t) ** 2 * (x - (1 - t) * MEAN)
    return torch.where(t == r, velocity, (x - ahead) / (t - r).clamp(min=1e-9))


def exact(x, time, conditions):
    t, r = time[:, None] / 1000, conditions["until"][:, None] / 1000
    return average(x, r, t)


def samples(t, count, seed=0):
    """x0 and noise (N, 1) of the same x_t whose velocity noise - x0 is the mean of all that lead there."""
    generator = torch.Generator().manual_seed(seed)
    x = (1 - t) * MEAN + spread(t) * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    v = average(x, t, t)
    return x - t * v, x + (1 - t) * v


PAIRS = [(0.9, 0.2), (1.0, 0.0), (0.5, 0.45), (0.3, 0.0), (0.6, 0.6)]


@pytest.mark.parametrize(("t", "r"), PAIRS)
def test_the_solution_is_its_own_goal(t, r):
    """To the error of a difference of second order, and of first order at the end t = 1, in float64."""
    rows = torch.tensor([[t, r]], dtype=torch.float64).repeat(200, 1)
    x0, noise = samples(rows[:, :1], 200)
    loss = MeanFlowLoss(Straight(), guidance=1.0, power=0.0)
    assert float(loss(exact64, None, x0, noise, rows, Conditions({}), None).max()) < (2e-4 if t == 1 else 1e-6)


def exact64(x, time, conditions):
    """The network's output stays float64, so that only the difference's own error is left."""
    return _Double(exact(x, time, conditions))


class _Double(torch.Tensor):
    """A tensor that `float()` leaves as it is."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_subclass(cls, values)

    def float(self):
        return self


@pytest.mark.parametrize("flip", ["goal", "span"])
def test_what_is_not_the_solution_has_a_loss(flip):
    """The instantaneous velocity, and the average to another time."""
    rows = torch.tensor([[0.9, 0.2]]).repeat(50, 1)
    x0, noise = (each.float() for each in samples(rows[:, :1].double(), 50))

    def wrong(x, time, conditions):
        t, r = time[:, None] / 1000, conditions["until"][:, None] / 1000
        return average(x, t, t) if flip == "goal" else average(x, 0.5 * r, t)

    value = MeanFlowLoss(Straight(), guidance=1.0)(wrong, None, x0, noise, rows, Conditions({}), None)
    assert float(value.median()) > 0.5


def test_guidance_is_inside():
    """Where r = t the goal is free + w (v - free)."""
    rows = torch.full((4, 2), 0.4)
    x0, noise = torch.randn(4, 3), torch.randn(4, 3)
    goals = []

    def student(x, time, conditions):
        return torch.zeros_like(x)

    for scale in (1.0, 3.0):
        loss = MeanFlowLoss(Straight(), guidance=scale, power=0.0)
        goals.append(loss(student, lambda x, time, conditions: conditions * x, x0, noise, rows, Conditions({}), 0.5))
    v, free = noise - x0, 0.5 * (0.6 * x0 + 0.4 * noise)
    torch.testing.assert_close(goals[0], v.square().sum(1))
    torch.testing.assert_close(goals[1], (free + 3 * (v - free)).square().sum(1))
    weighted = MeanFlowLoss(Straight(), guidance=1.0)(student, None, x0, noise, rows, Conditions({}), None)
    torch.testing.assert_close(weighted, goals[0] / (goals[0] + mean_flow.C))


def test_guidance_over_an_interval():
    """The goal is v' - (t - r) du/dt with the guided velocity v', which also moves x; for a network u = a x + b t + c r
    du/dt = a v' + b.
    """
    rows = torch.tensor([[0.7, 0.3]], dtype=torch.float64).repeat(4, 1)
    x0, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c, w = 0.8, 1.5, -0.4, 3.0

    def student(x, time, conditions):
        return _Double(a * x + b * time[:, None] / 1000 + c * conditions["until"][:, None] / 1000)

    def teacher(x, time, uncond):
        return uncond * x

    loss = MeanFlowLoss(Straight(), guidance=w, power=0.0)(student, teacher, x0, noise, rows, Conditions({}), 0.5)
    x, v = 0.3 * x0 + 0.7 * noise, noise - x0
    guided = 0.5 * x + w * (v - 0.5 * x)
    goal = guided - 0.4 * (a * guided + b)
    torch.testing.assert_close(loss, (a * x + b * 0.7 + c * 0.3 - goal).square().sum(1), rtol=1e-5, atol=1e-6)


def test_times():
    """t is the later of two sigmoids of normal draws; a quarter of the pairs are apart."""
    loss, rng = MeanFlowLoss(Straight(), guidance=1.0), np.random.default_rng(0)
    rows = torch.stack([loss.rows(400.0, rng) for _ in range(4000)])
    assert (rows[:, 0] >= rows[:, 1]).all()
    assert ((rows[:, 0] == 0.4) | (rows[:, 1] == 0.4)).all()
    apart = rows[:, 0] != rows[:, 1]
    assert abs(float(apart.float().mean()) - mean_flow.SHARE_OF_INTERVALS) < 0.03
    other = torch.where(rows[:, 0] == 0.4, rows[:, 1], rows[:, 0])[apart]
    assert abs(float(torch.logit(other).mean()) - mean_flow.LOG_MEAN) < 0.1
    assert abs(float(torch.logit(other).std()) - mean_flow.LOG_STD) < 0.1


def test_only_straight_paths():
    with pytest.raises(ValueError, match="requires a straight path"):
        MeanFlowLoss(VariancePreserving.linear(), guidance=1.0)


@pytest.mark.slow
def test_it_learns_to_draw_in_one_step():
    """The mean and the spread of the data, from the data alone; the first goal is the plain velocity."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)
    )

    def student(x, time, conditions):
        return net(torch.cat([x, time[:, None] / 1000, conditions["until"][:, None] / 1000], 1))

    loss, rng = MeanFlowLoss(Straight(), guidance=1.0, power=0.0), np.random.default_rng(0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    generator = torch.Generator().manual_seed(0)
    known = torch.stack([loss.rows(float(t), rng) for t in rng.uniform(1, 1000, 20_000)])
    for _ in range(3000):
        x0 = MEAN + STD * torch.randn(256, 1, generator=generator)
        rows = known[torch.randint(len(known), (256,), generator=generator)]
        noise = torch.randn(256, 1, generator=generator)
        value = loss(student, None, x0, noise, rows, Conditions({}), None).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(4000, 1, generator=generator)
    with torch.no_grad():
        ends = {name: torch.full((4000,), time) for name, time in (("until", 0.0),)}
        draw = x - student(x, torch.full((4000,), 1000.0), Conditions(ends))
        at_once = x - student(x, torch.full((4000,), 1000.0), Conditions({"until": torch.full((4000,), 1000.0)}))
    assert abs(float(draw.mean()) - MEAN) < 0.06
    assert abs(float(draw.std()) - STD) < 0.08
    assert float(at_once.std()) < 0.2, "one step along the instantaneous velocity ends at the mean"


# networks


def unet():
    made = UNet(stable_diffusion.unet("1", tiny=True))
    made.add_time_condition("until")
    torch.nn.init.normal_(made.model.time_embedding.cond_proj.weight)
    return made


def test_a_u_net_reads_where_a_step_ends(tmp_path):
    network, x = unet(), torch.randn(2, 4, 8, 8)
    assert network.spec.reads["until"] == ()
    tokens = {"tokens": torch.randn(2, 77, 64)}

    def at(*until):
        return network.predict(x, 600.0, Conditions({**tokens, "until": torch.tensor(until)}))

    assert torch.equal(network.predict(x, 600.0, Conditions(tokens)), at(600.0, 600.0)), "by default it is t itself"
    assert not torch.equal(at(600.0, 600.0), at(200.0, 200.0))
    torch.testing.assert_close(at(600.0, 200.0)[1], at(200.0, 200.0)[1])
    network.save(tmp_path)
    again = UNet(diffusers.UNet2DConditionModel.from_pretrained(tmp_path))
    assert again.spec == network.spec


def test_a_walk_tells_each_step_its_end():
    """Each evaluation reads the next time of the grid; under two conditions at once too."""
    seen = []

    class Seen:
        spec = unet().spec

        def predict(self, x, time, conditions):
            seen.append((time, conditions["until"].tolist()))
            return x

    walked = averaging(Seen(), [1000.0, 500.0, 0.0], torch.as_tensor)
    assert type(walked) is WithStepEnds
    x = torch.zeros(2, 4, 8, 8)
    walked.predict(x, 1000.0, Conditions({}))
    walked.predict(x, 500.0, Conditions({}, count=2))
    walked.predict(x, 700.0, Conditions({}))
    assert seen == [(1000.0, [500.0] * 2), (500.0, [[0.0] * 2] * 2), (700.0, [700.0] * 2)]
    plain = replace_reads(Seen)
    assert averaging(plain, [1.0], torch.as_tensor) is plain


def replace_reads(kind):
    """The same without `until`."""
    made = kind()
    made.spec = replace(made.spec, reads={"tokens": (None, 64)})
    return made


# students


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny model of a straight path, taught for three steps."""
    folder = tmp_path_factory.mktemp("mean-flow")
    made = stable_diffusion.pipeline("1")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.StableDiffusionPipeline(
        **{**made.components, "scheduler": scheduler}, requires_safety_checker=False
    ).save_pretrained(folder / "teacher")
    as_jsonl(folder / "pictures", some_pictures(4, 64))
    words = ("--method", "consistency", "--steps", 3, "--train-batch-size", 2, "--lr", 1e-3, "--validation-steps", 3)
    words += ("--set", "previews.count=1", "--set", "previews.num_inference_steps=1", "--resolution", 64)
    words += ("--set", "consistency.objective=mean-flow")
    code, err = Started("finetune", folder / "teacher", folder / "pictures", "-o", folder / "run", *words).ended()
    assert code == 0, err
    return folder


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def draw(pipe, **options):
    return pipe("a star", seed=2, height=64, width=64, output_type="uint8", **options).images.astype(int)


def test_what_was_learnt_is_drawn(student):
    """By its own recommendation: Euler's steps along average velocities."""
    pipe = load(student / "run" / "model")
    few = {"sampler": "euler", "spacing": "trailing", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert {name: pipe.card.defaults[name] for name in few} == few
    assert pipe.model.backbone.model.time_embedding.cond_proj.weight.abs().max() > 0
    options = {"latents": noise(), "output_type": "latent", "height": 64, "width": 64}
    x, tokens = noise(), pipe.model.encoder.encode(Prompt("a star"))["tokens"]
    for t, r in pairwise((1.0, 0.75, 0.5, 0.25, 0.0)):
        conditions = Conditions({"tokens": tokens[None], "until": torch.tensor([1000 * r])})
        x = x - (t - r) * pipe.model.backbone.predict(x, 1000 * t, conditions)
    for sampler in ("euler", "ddim"):
        ours = torch.as_tensor(pipe("a star", sampler=sampler, **options).images)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    other = torch.as_tensor(pipe("a star", sampler="heun", **options).images)
    assert (other - x).abs().max() > 1e-3, "Heun's method follows instantaneous velocities"


def test_previews_are_what_the_model_draws(student):
    with Image.open(student / "run" / "finetune" / "samples" / "step-00000003.png") as file:
        row, about = np.asarray(file.convert("RGB")).astype(int), json.loads(file.text["Description"])
    options = {"seed": 0, "num_inference_steps": 1, "output_type": "uint8", "height": 64, "width": 64}
    pipe = load(student / "run" / "model")
    assert np.abs(pipe(about["prompts"][0], **options).images[0].astype(int) - row).max() <= 1
    assert np.abs(pipe(about["prompts"][0], preset="lcm", **options).images[0].astype(int) - row).max() > 1


@pytest.mark.slow
def test_by_openvino(student, call, tmp_path):
    assert call("convert", student / "run" / "model", tmp_path / "compiled", "--to", "openvino")[0] == 0
    settings = {"runtime": "openvino", "torch_dtype": torch.float32}
    compiled = LatentDiffusionPipeline.from_pretrained(tmp_path / "compiled", **settings)
    assert np.abs(draw(compiled) - draw(load(student / "run" / "model"))).max() <= 1


def test_diffusers_does_not_draw_it_wrongly(student):
    """Its pipelines know no end of a step, so the folder names one that diffusers refuses."""
    with pytest.raises(AttributeError, match="LatentDiffusionPipeline"):
        diffusers.DiffusionPipeline.from_pretrained(student / "run" / "model")


def test_a_network_that_reads_something_unknown_is_refused(student, tmp_path):
    folder = shutil.copytree(student / "run" / "model", tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"until"', '"zork"'))
    with pytest.raises(ModelError, match=r"time_cond must be guidance or until \(got 'zork' in .*unet/config.json\)"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency.steps": 20}, "steps has no effect"),
        ({"consistency.huber": 0.5}, "huber has no effect"),
        ({"consistency.guidance_range": [2, 3]}, "guidance_range has no effect"),
        ({"finetune.times": "logit_normal"}, "its own times"),
        ({"lora.rank": 4}, "has no rank"),
    ],
)
def test_refused_settings(settings, message):
    given = {"method": "consistency", "data.kind": "pictures", "data.pictures.source": "photos"}
    given |= {"consistency.objective": "mean-flow", **settings}
    with pytest.raises(ConfigError, match=message):
        load_finetuning(None, tuple(given.items()))


def test_models_of_other_paths_are_refused(student, tmp_path):
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "epsilon")
    words = ("--method", "consistency", "--set", "consistency.objective=mean-flow", "--resolution", 64)
    code, err = Started("finetune", tmp_path / "epsilon", student / "pictures", "-o", tmp_path / "run", *words).ended()
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: a mean flow requires a model of a straight path that predicts its velocity (flow)",
    )
