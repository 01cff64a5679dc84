"""The stage of fine-tuning: a model learns the user's pictures by a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from latentdiff.core.annotators import annotator
from latentdiff.core.errors import ConfigError, saving
from latentdiff.core.files import recorded
from latentdiff.data.companions import companions
from latentdiff.data.dataset import DataSet, open_data
from latentdiff.data.examples import Examples
from latentdiff.diffusion import mean_flow
from latentdiff.diffusion.consistency import ConsistencyLoss
from latentdiff.diffusion.easy_consistency import LOG_MEAN, LOG_STD, EasyConsistencyLoss
from latentdiff.diffusion.mean_flow import MeanFlowLoss
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.times import Times
from latentdiff.drawing.draw import requested
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.plan import plan as plan_picture
from latentdiff.families.loading import DEFAULT_MODEL, stored_model
from latentdiff.families.own import times_of
from latentdiff.families.weights import weights_hash
from latentdiff.model import Model
from latentdiff.runtime.device import moved
from latentdiff.runtime.quantized import quantized
from latentdiff.settings.config import Override, save_config
from latentdiff.settings.finetuning import FILE, STAGE, FineTuning, load_finetuning
from latentdiff.stages.beside import Hinted, OwnPicture
from latentdiff.stages.cache import captions_of, latents_of
from latentdiff.stages.class_pictures import class_data, draw_class
from latentdiff.stages.denoiser import prepare_unet
from latentdiff.stages.few_steps import few_steps
from latentdiff.stages.finetune_report import keep_rows_apart, prompts_of, report, write_page
from latentdiff.stages.methods import Tuning, begin, check_kind, trainable
from latentdiff.stages.plan import Weights, plan_lines
from latentdiff.stages.run import Run
from latentdiff.training.consistency import ConsistencyStage
from latentdiff.training.denoiser import TIME_BINS, DenoiserStage, Draws, Samples
from latentdiff.training.loop import Stage
from latentdiff.training.order import Order
from latentdiff.training.prior import PriorStage
from latentdiff.training.run import peak_memory, run_stage


def finetune(run: Run[FineTuning], model: Model, say: Callable[..., None]) -> list[Path]:
    """Fine-tune a model, from where an earlier start stopped; returns the paths that were written."""
    config, accelerator = run.config, run.accelerator
    made_from = identity_of_model(model)
    if config.control.source:
        made_from += f" {_control_pictures(run, [run.data.training])[0].pictures.identity()}"
    prior = _prior(run, model, made_from)
    tuning = begin(model, config, run.data.training.words())
    if tuning.ip_adapter is not None and tuning.ip_adapter.encoder is not None:
        made_from += f" {weights_hash(tuning.ip_adapter.encoder)}"
    say(*plan(run, model, tuning))
    unet, text_encoder, _ = trainable(model)
    prepare_unet(unet, config.finetune, accelerator)
    if config.mixed_precision == "bf16":
        narrow_frozen(unet)
    model = moved(model, accelerator.device)
    stage, validation = _stages(run, model, tuning, prior)
    if config.finetune.cache and not (tuning.trains_text_encoder or config.data.pictures.captions.shuffle_tags):
        text_encoder.to("cpu")  # every caption is encoded: frees three gigabytes of SDXL
    if accelerator.is_main_process:
        keep_rows_apart(run.folder / STAGE / "samples", config, run.data.validation)
        if not (run.folder / FILE).is_file():  # only once a resumed run has been accepted
            save_config(config, run.folder / FILE)
    start = run.start(STAGE, made_from=made_from + (f" {prior.fingerprint['sha256']}" if prior else ""))
    folder = run.folder / STAGE
    controls = () if tuning.control is None else (tuning.control,)
    ip_adapters = () if tuning.ip_adapter is None else (tuning.ip_adapter.to(accelerator.device),)
    painter = Painter(model, controls=controls, ip_adapters=ip_adapters)
    held_out = run.data.validation
    reported = partial(
        report, painter, config, held_out, _control_pictures(run, [held_out])[0], validation, folder / "samples"
    )
    settings = config.finetune.training
    run_stage(accelerator, stage, settings, folder, reported, start, run.interruption, from_the_start=True)
    paths: list[Path] = []
    if accelerator.is_main_process:
        save_config(config, run.folder / FILE)
        with saving("the trained weights", run.folder):
            paths = tuning.write(run.folder, metadata_of(run, model))
        sheets: list[np.ndarray] = []
        if tuning.teacher is not None:
            sheets = few_steps(painter, tuning.teacher, config, prompts_of(config, held_out))
        paths += write_page(run, paths, sheets)
    accelerator.wait_for_everyone()
    return paths


def load_settings_and_model(path: Path | None, overrides: tuple[Override, ...]) -> tuple[FineTuning, Model]:
    """The settings, with defaults for the model's size, and the model in float32, or with quantized weights.

    Raises ConfigError, ModelError.
    """
    config = load_finetuning(path, overrides)
    model = moved(stored_model(config.model or None, config.variant, config.revision), "cpu", torch.float32)
    if config.quantize is not None:
        model = quantized(model, config.quantize)
    size = sum(parameter.numel() for parameter in model.modules()[0].parameters())
    config = load_finetuning(path, overrides, size)
    return config.model_copy(update={"image_size": config.image_size or model.card.size[0]}), model


def plan(run: Run[FineTuning], model: Model, tuning: Tuning) -> list[str]:
    """The plan of this start."""
    config = run.config
    what = f"{config.model or 'the default model'} by {config.method}"
    what += f", weights {config.quantize}" if config.quantize else ""
    what += f", rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.low_rank else ""
    lines = [f"teach {what}, learning rate {config.finetune.training.learning_rate:g}"]
    if config.prior.prompt:
        source = f"{config.prior.pictures} pictures, drawn by the model as it is,"
        lines.append(
            f"beside {f'those of {config.prior.source}' if config.prior.source else source} of {config.prior.prompt!r}"
        )
    return [*lines, *plan_lines(run, {STAGE: weights_of(model, tuning)})]


def rehearse(run: Run[FineTuning], model: Model) -> list[str]:
    """The plan, with the time and memory of a step. Nothing is written, but the model must not be used afterwards."""
    if run.config.prior.source:
        _prior(run, model, "")  # raises DataError for faults
    tuning = begin(model, run.config)
    lines = plan(run, model, tuning)
    prepare_unet(trainable(model)[0], run.config.finetune, run.accelerator)
    model = moved(model, run.accelerator.device)
    seconds = timed_step(run, model, tuning) * (2 if run.config.prior.prompt else 1)
    hours = seconds * run.config.finetune.training.max_train_steps / 3600
    total = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} minutes"
    memory = f"{peak_memory() / 1e9:.1f} GB in use at most so far"
    return [*lines, f"a step takes {seconds:.2g} s here, all of them {total}; {memory}"]


def identity_of_model(model: Model) -> str:
    """A hash of the model's weights, whatever file they came from."""
    return " ".join(weights_hash(network) for network in reversed(model.modules()))


def _prior(run: Run[FineTuning], model: Model, made_from: str) -> DataSet | None:
    """The class pictures; missing ones are drawn now."""
    if run.config.prior.prompt is None:
        return None
    folder = run.folder / "classes"
    with run.accelerator.main_process_first():
        if run.accelerator.is_main_process and not run.config.prior.source:
            painter = Painter(moved(model, run.accelerator.device))
            draw_class(painter, run.config, folder, made_from)
    return open_data(run.config.model_copy(update={"data": class_data(run.config, folder)}))


def narrow_frozen(unet: nn.Module) -> None:
    """Store frozen weights of the U-Net in the precision of the arithmetic, which halves most of the memory.

    The text encoder and the autoencoder keep their precision, so that cached and uncached values are equal.
    """
    for parameter in unet.parameters():
        if not parameter.requires_grad and type(parameter) is nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _stages(run: Run[FineTuning], model: Model, tuning: Tuning, prior: DataSet | None) -> tuple[Stage, DenoiserStage]:
    """The stage for training, and the one for validation with fixed times and noise, all captions and no weights."""
    config = run.config
    learning, times = config.finetune, times_of(config.finetune, model.path)
    sets = [run.data.training, run.data.validation, *([prior.training] if prior else [])]
    trained, validated, *others = _samples(run, model, tuning, sets)
    if tuning.teacher is not None:
        return _distilled(run, model, tuning, trained, validated)
    loss = DiffusionLoss(model.path, model.prediction, learning.weighting, learning.snr_gamma)
    rates = learning.caption_dropout, learning.noise_offset, learning.input_perturbation
    made = partial(DenoiserStage, tuning.module, tuning.parts)
    own = made(loss, trained, Draws(config.seed, times, *rates), _order(run, run.data.training, "training"))
    plain = DiffusionLoss(model.path, model.prediction)
    draws = Draws(config.seed, Times(model.path, bins=TIME_BINS), purpose="validation")
    validation = made(plain, validated, draws, _order(run, run.data.validation, "validation"))
    if prior is None:
        return own, validation
    draws = Draws(config.seed, times, *rates, purpose="prior")
    beside = made(loss, others[0], draws, _order(run, prior.training, "prior"))
    return PriorStage(own, beside, config.prior.weight), validation


def _distilled(
    run: Run[FineTuning], model: Model, tuning: Tuning, trained: Samples, validated: Samples
) -> tuple[Stage, DenoiserStage]:
    """The stages of a student, whose teacher is the model as it was."""
    config, settings = run.config, run.config.consistency
    guidance = settings.guidance or float(model.card.defaults.get("guidance_scale", 7.5))
    loss, times = _loss_of(config, model, guidance)
    teacher = tuning.teacher.to(run.accelerator.device)
    made = partial(ConsistencyStage, tuning.module, tuning.parts, loss, teacher, guidance=settings.guidance_range)
    rates = config.finetune.caption_dropout, config.finetune.noise_offset
    own = Draws(config.seed, times, *rates)
    fixed = Draws(config.seed, Times(model.path, bins=TIME_BINS), purpose="validation")
    training, validation = _order(run, run.data.training, "training"), _order(run, run.data.validation, "validation")
    return made(trained, own, training), made(validated, fixed, validation)


def _loss_of(config: FineTuning, model: Model, guidance: float) -> tuple[Any, Times]:
    """The loss of a student, and the times at which it is trained."""
    settings, path, prediction = config.consistency, model.path, model.prediction
    if settings.objective == "mean-flow":
        return MeanFlowLoss(path, guidance=guidance), Times(path, "logit_normal", mean_flow.LOG_MEAN, mean_flow.LOG_STD)
    if settings.objective == "ect":
        times = Times(path, "log_normal", LOG_MEAN, LOG_STD)
        huber = settings.huber
        return EasyConsistencyLoss(path, prediction, shrink=settings.shrink, guidance=guidance, huber=huber), times
    loss = ConsistencyLoss(path, prediction, steps=settings.steps, guidance=guidance, huber=settings.huber)
    return loss, times_of(config.finetune, path)


def _order(run: Run[FineTuning], examples: Examples, purpose: str) -> Order:
    training = run.config.finetune.training
    step = training.train_batch_size * training.gradient_accumulation_steps * run.accelerator.num_processes
    buckets = list(examples.pictures.buckets().values())
    return Order(run.config.seed, purpose, buckets, 1 if purpose == "validation" else step)


def _samples(run: Run[FineTuning], model: Model, tuning: Tuning, sets: list[Examples]) -> list[Samples]:
    config = run.config
    learning = config.finetune.model_copy(update={"tune_text_encoder": tuning.trains_text_encoder})
    _, text_encoder, codec = trainable(model)
    latents = latents_of(learning, sets, codec, run.cache, run.accelerator)
    captions = captions_of(learning, sets, text_encoder, run.cache, run.accelerator, sized=model.reads_sizes)
    if tuning.control is not None:
        seen = _control_pictures(run, sets)
        change = config.control.made_by
        annotate = (lambda pixels: pixels) if change is None else annotator(change)
        captions = [Hinted(own, examples, annotate) for own, examples in zip(captions, seen, strict=True)]
    if (adapter := tuning.ip_adapter) is not None:
        rates = [config.image_prompt.dropout, *[0.0] * (len(sets) - 1)]  # the validation shows all
        pairs = zip(captions, sets, rates, strict=True)
        captions = [OwnPicture(*pair, adapter=adapter, seed=config.seed) for pair in pairs]
    names = [examples.pictures.name for examples in sets]
    return [Samples(*of_set) for of_set in zip(latents, captions, names, strict=True)]


def _control_pictures(run: Run[FineTuning], sets: list[Examples]) -> list[Examples]:
    """The pictures that a control reads, before its annotator: those of its own folder, or the sets' own."""
    source = run.config.control.source
    cache = run.cache if run.config.finetune.cache else None
    return companions(run.config, sets, source, cache) if source else sets


def check_fits(model: Model, config: FineTuning, data: DataSet) -> None:
    """Refuse data that the model cannot take, before training. Raises ConfigError."""
    check_kind(model)
    for size in data.training.pictures.buckets():
        if any(side % model.multiple for side in size):
            shape = f"{size[1]}x{size[0]}, not of multiples of {model.multiple}"
            raise ConfigError(f"pictures would be {shape}: change --resolution or data.pictures.bucket_step")
    request = requested(Painter(model), "-", height=config.image_size, width=config.image_size)
    plan_picture(request, model)  # the pictures of validations
    _check_captions(config, data)
    if data.survey and data.survey.listing.streamed:
        raise ConfigError(
            "a streamed data set is read once, in its own order: fine-tuning needs pictures it can go back to"
        )


def _check_captions(config: FineTuning, data: DataSet) -> None:
    """Raises ConfigError if no picture would get the instance prompt, or no caption has the new word."""
    instance, captions = config.data.pictures.instance_prompt, data.training.every_caption()
    own = data.survey and instance is not None and all(p.captions != (instance,) for p in data.survey.pictures)
    if own:
        why = "the instance prompt is the caption of pictures that have none, and all of these have their own"
        raise ConfigError(f"{why}. Leave it out, or ignore theirs by --set data.pictures.layout=uncaptioned")
    if config.method == "textual-inversion" and captions and not any(config.word.token in c for c in captions):
        raise ConfigError(f"no caption holds the word {config.word.token}: it would learn nothing")


def weights_of(model: Model, tuning: Tuning) -> Weights:
    """The bytes of trained and of frozen weights."""
    networks = [*model.modules(), tuning.module, tuning.teacher, tuning.ip_adapter and tuning.ip_adapter.encoder]
    every = {id(p): p for network in networks if isinstance(network, nn.Module) for p in network.parameters()}.values()
    trained = sum(p.nbytes for p in every if p.requires_grad)
    return Weights(trained, sum(p.nbytes for p in every) - trained)


def timed_step(run: Run[FineTuning], model: Model, tuning: Tuning) -> float:
    """Seconds of the forward and backward pass of a step: the second run of two on the first samples."""
    learning = run.config.finetune.model_copy(update={"cache": False})
    uncached = run.config.model_copy(update={"finetune": learning})
    stage, _ = _stages(Run(uncached, run.folder, run.accelerator, run.data, run.checkpoints), model, tuning, None)
    module = tuning.module.to(run.accelerator.device)
    batch: Any = send_to_device(stage.batch(range(learning.training.train_batch_size)), run.accelerator.device)
    for _ in range(2):
        began = time.monotonic()
        with run.accelerator.autocast():
            loss = stage.loss(module, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())
    return (time.monotonic() - began) * learning.training.gradient_accumulation_steps


def metadata_of(run: Run[FineTuning], model: Model) -> Mapping[str, str]:
    """Metadata of the training under kohya's and modelspec's keys."""
    config, training = run.config, run.config.finetune.training
    kind = "of-its-own" if model.family is None else model.family.called(model)
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{kind}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if model.prediction == "v_prediction" else model.prediction,
        "modelspec.title": config.name,
        "modelspec.resolution": f"{config.image_size}x{config.image_size}",
        "ss_output_name": config.name,
        "ss_base_model": recorded(Path(config.model)) if config.model else DEFAULT_MODEL,
        "ss_num_train_images": str(len(run.data.training)),
        "ss_steps": str(training.max_train_steps),
        "ss_learning_rate": str(training.learning_rate),
        "ss_optimizer": training.optimizer,
        "ss_seed": str(config.seed),
        "ss_mixed_precision": config.mixed_precision,
        "ss_resolution": str(config.image_size),
        "ss_min_snr_gamma": str(config.finetune.snr_gamma or 5) if config.finetune.weighting == "min_snr" else "None",
    }
    if config.low_rank:
        metadata |= {"ss_network_dim": str(config.lora.rank), "ss_network_alpha": str(config.lora.alpha)}
    return metadata
