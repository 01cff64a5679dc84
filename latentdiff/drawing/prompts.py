"""The conditions of a batch of pictures, with and without their prompts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

from latentdiff.core.arrays import Array
from latentdiff.core.errors import ConfigError
from latentdiff.core.turn import Turn
from latentdiff.core.vocabulary import narrow, unseen
from latentdiff.drawing.batch import Batch, Job
from latentdiff.drawing.plan import Size
from latentdiff.drawing.request import Request
from latentdiff.model import Enlarging, Model
from latentdiff.networks.conditions import Conditions, stacked
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.networks.protocols import Encoder

SCORES = (6.0, 2.5)  # aesthetic scores: for the prompt, for the negative prompt (Podell et al. 2023; diffusers)
MOST = 256  # remembered prompts; the conditions of Stable Diffusion take a quarter of a megabyte a prompt


class Memory:
    """The conditions of the prompts used last; threads may share it."""

    def __init__(self) -> None:
        self._known: OrderedDict[Prompt, Conditions] = OrderedDict()
        self._turn = Turn()

    def encoded(self, encoder: Encoder, prompt: Prompt) -> Conditions:
        """The encoder's conditions for a prompt, computed once."""
        with self._turn:
            if prompt not in self._known:
                self._known[prompt] = encoder.encode(prompt)
                while len(self._known) > MOST:
                    self._known.popitem(last=False)
            self._known.move_to_end(prompt)
            return self._known[prompt]

    def __len__(self) -> int:
        return len(self._known)


class Prompted(NamedTuple):
    """Conditions of the prompts and, only where guidance needs them, of the negative prompts."""

    cond: Conditions
    uncond: Conditions | None


def style_of(request: Request) -> Style:
    """The style in which a request's prompt is read."""
    return Style(request.prompt_weights, request.long_prompts, request.clip_skip)


def chunks_of(job: Job, model: Model) -> int:
    """The number of chunks of a picture's longer prompt: both prompts get conditions of this length."""
    encoder = model.encoder
    if job.embeds is not None:
        return len(job.embeds[0]["tokens"]) // encoder.length
    style = style_of(job.request)
    is_guided = job.request.cfg(model.reads_guidance) > 1
    prompts = [job.request.prompt] + [job.request.negative_prompt] * is_guided
    return max(encoder.read(prompt, style).chunks for prompt in prompts)


def notes_of(batch: Batch, model: Model, *, adapted: bool) -> list[str]:
    """What the writers of a batch's prompts should know, each once.

    Text that they may have meant otherwise, and words that the model has never seen, or only in captions of one thing,
    unless it is `adapted`: an adapter does not say which words it was trained on.
    """
    notes: dict[str, None] = {}
    learnt = _learnt_words(model.encoder)
    texts = " ".join(f"{job.request.prompt} {job.request.negative_prompt}" for job in batch.jobs).lower()
    if learnt and not any(word.lower() in texts for word in learnt):
        notes[f"the prompt has no learnt word ({', '.join(learnt)})"] = None
    encoder, known = model.encoder, None if adapted else model.card.words
    for job in batch.jobs:
        guided = job.request.cfg(model.reads_guidance) > 1
        if job.request.negative_prompt and not guided:
            scale = "true_cfg_scale" if model.reads_guidance else "guidance_scale"
            notes[f"the negative prompt has no effect: it requires {scale} over 1"] = None
        names = ("prompt", "negative_prompt") if guided else ("prompt",)
        for name in names if job.embeds is None else ():
            prompt = getattr(job.request, name)
            read = encoder.read(prompt, style_of(job.request))
            notes |= dict.fromkeys(f"{name}: {note}" for note in read.notes)
            if known is not None and (words := unseen(prompt, known)):
                notes[f"{model.card.name} has never seen: {_listed(words)}"] = None
            if known is not None and (of_one := narrow(prompt, model.card.of_one_thing)):
                pairs = [f"{word} ({name})" for word, name in of_one.items()]
                notes[f"{model.card.name} has seen only in captions of one thing: {_listed(pairs)}"] = None
    return list(notes)


def _listed(words: list[str], most: int = 20) -> str:
    """Words in one line: at most `most` of them, and only the beginning of long ones."""
    short = [word if len(word) <= 40 else f"{word[:40]}..." for word in words[:most]]
    return ", ".join(short) + (f" and {len(words) - most} more" if len(words) > most else "")


def prompted(batch: Batch, model: Model, size: Size, memory: Memory | None = None) -> Prompted:
    """The conditions of a batch, whose pictures have one size and whose conditions have one length.

    Equal prompts are encoded once and by themselves, so that none depends on the batch's size. As in diffusers,
    clip_skip applies to the prompt only. memory: prompts of earlier batches.
    """
    from latentdiff.networks.encoders.joined import with_sizes  # imports NumPy, which a refused request does not need

    request, encoder = batch.request, model.encoder
    style, least = style_of(request), max(chunks_of(job, model) for job in batch.jobs)
    known = Memory() if memory is None else memory
    sizes, sizes_of_negative = (_sizes(model, request, size, score) for score in SCORES)

    def encoded(prompt: str, style: Style, sizes: tuple[float, ...] | None = sizes) -> Conditions:
        return known.encoded(encoder, Prompt(prompt, style, least, sizes))

    def of(job: Job) -> Conditions:
        if job.embeds is None:
            return encoded(job.request.prompt, style)
        return with_sizes(job.embeds[0], sizes)

    cond = stacked([of(job) for job in batch.jobs]).mapped(model.array)
    reads_guidance, more = model.reads_guidance, _of_request(model, request, len(batch))
    cond = cond.joined(more)
    if request.cfg(reads_guidance) <= 1:
        return Prompted(cond, None)
    plain = replace(style, clip_skip=None)
    negative = []
    for job in batch.jobs:
        own = None if job.embeds is None else job.embeds[1]
        other = (
            encoded(job.request.negative_prompt, plain, sizes_of_negative)
            if own is None
            else with_sizes(own, sizes_of_negative)
        )
        negative.append(other)
    uncond = stacked(negative).mapped(model.array).joined(more)
    _check_shapes(cond, uncond)
    return Prompted(cond, uncond)


def _sizes(model: Model, request: Request, size: Size, score: float) -> tuple[float, ...] | None:
    """The sizes that the backbone reads, in pixels; a refiner reads an aesthetic score in place of the size."""
    if not model.reads_sizes:
        return None
    scored = model.backbone.spec.reads["sizes"] == (5,)
    return tuple(map(float, (*(request.original_size or size), *request.crop, *((score,) if scored else size))))


def _of_request(model: Model, request: Request, count: int) -> dict[str, Array]:
    """The conditions that are numbers of the request, (B,): the guidance, and the noise of a small picture."""
    import numpy as np

    numbers: dict[str, float] = {}
    if model.reads_guidance:
        numbers["guidance"] = request.guidance_scale
    if model.enlarging is not None:
        numbers["label"] = noise_level(model.enlarging, request)
    return {name: model.array(np.full(count, number, np.float32)) for name, number in numbers.items()}


def noise_level(enlarging: Enlarging, request: Request) -> int:
    """The time of the noise that a small picture gets."""
    return enlarging.usual if request.noise_level is None else request.noise_level


def _check_shapes(cond: Conditions, uncond: Conditions) -> None:
    for name, array in cond.arrays.items():
        if array.shape != uncond[name].shape:
            shapes = f"{tuple(array.shape[1:])}, the empty prompt's {tuple(uncond[name].shape[1:])}"
            raise ConfigError(f"prompt_embeds of {shapes} require negative_prompt_embeds")


def _learnt_words(encoder: Encoder) -> list[str]:
    """The learnt words that prompts may have; word_1, word_2, ... are further vectors of a word."""
    words = [word for each in getattr(encoder, "encoders", ())[:1] for word in each.learnt_words]
    return [word for word in words if word.rpartition("_")[0] not in words]
