"""The settings of a training run: pydantic models read from TOML.

A config file lists only what differs from the defaults below. Unknown keys are refused with the nearest known key, and
values out of range are refused. The effective config is saved with the run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentdiff.core.errors import ConfigError
from latentdiff.core.files import write_text
from latentdiff.settings.recommended import Recommended
from latentdiff.settings.validation import did_you_mean, first_fault

STAGES = ("autoencoder", "clip", "denoiser")  # the stages of a run, in order
Override = str | tuple[str, Any]
AnySettings = TypeVar("AnySettings", bound="Settings")


class Section(BaseModel):
    """A table of a config file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Training(Section):
    """The optimisation of one stage; names are those of diffusers' training scripts."""

    max_train_steps: int = Field(10_000, ge=1, le=10**9, description="steps of the optimizer")
    train_batch_size: int = Field(64, ge=1, le=2**20, description="pictures of a batch on one process")
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**20, description="batches whose gradients make one step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the learning rate")
    lr_schedule: Literal["trapezoid", "cosine", "linear", "constant"] = Field(
        "trapezoid", description="course of the learning rate after the warm-up"
    )
    lr_warmup_steps: int = Field(200, ge=0, description="steps in which the learning rate rises from 0")
    lr_decay: float = Field(
        0.3, ge=0, le=1, description="share of the steps at the end in which a trapezoid falls to 0"
    )
    optimizer: Literal["adamw", "muon", "adamw_8bit"] = Field(
        "adamw", description="muon applies to matrices, AdamW to the rest; adamw_8bit requires bitsandbytes"
    )
    adam_beta2: float = Field(0.99, gt=0, lt=1, description="decay of AdamW's second moment")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of the gradient; a longer one is scaled down")
    ema: Literal["constant", "power"] = Field(
        "constant",
        description="average of the weights: with a constant decay, or a power of the step (Karras et al. 2024)",
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="limit of the constant decay; 0 turns averaging off")
    ema_power: float = Field(
        6.94, gt=0, description="power decay: step t has the weight t^ema_power (6.94: a width of 10%)"
    )
    ema_offload: bool = Field(False, description="store the average in the CPU's memory, a little slower")
    num_workers: int = Field(0, ge=0, le=64, description="processes that prepare batches; they change no number")
    compile: bool = Field(False, description="torch.compile: takes a minute or two first, then steps are faster")
    checkpointing_steps: int = Field(500, ge=1, description="steps between checkpoints")
    checkpoints_total_limit: int = Field(2, ge=2, description="number of checkpoints that are kept")
    validation_steps: int = Field(1000, ge=1, description="steps between validations")


Fraction = Annotated[float, Field(ge=0, le=1)]


class Captions(Section):
    """How a picture's captions become its training prompt (latentdiff/data/captions.py)."""

    choice: Literal["random", "first"] = Field("random", description="the choice among several captions in each epoch")
    shuffle_tags: bool = Field(False, description="a new order of comma-separated tags in each epoch")
    keep_tags: int = Field(0, ge=0, description="number of tags that stay in front")
    templates: tuple[Annotated[str, Field(pattern=r"\{\}")], ...] = Field(
        ("{}",), min_length=1, description="texts in which {} is replaced by the caption; one is chosen each epoch"
    )
    prefix: str = Field("", description="text before every caption")


class Pictures(Section):
    """A data set of the user's own: its place, what is read from it, and how a picture becomes a sample."""

    source: str = Field("", description="a folder, shards-{000..099}.tar, .parquet files, or a hub id")
    layout: Literal["auto", "metadata", "sidecars", "uncaptioned", "drawn", "classes", "shards", "table"] = Field(
        "auto",
        description="where captions are; auto finds out; drawn: the records of drawn pictures; classes: folders' names",
    )
    split: str = Field("train", description="the split of a table or of folders named train, test, ...")
    image_column: str | None = Field(None, description="a table's column of pictures (default: image)")
    caption_column: str | None = Field(None, description="a table's column of captions (default: text)")
    streaming: bool = Field(False, description="for a table: read in order, never stored")
    follow_links: bool = Field(False, description="read what symbolic links out of the folder lead to")
    instance_prompt: str | None = Field(None, min_length=1, description="caption of pictures without one")
    allow_missing_captions: bool = Field(False, description="train pictures without a caption on the empty one")
    skip_bad: bool = Field(False, description="leave out unusable pictures, and list them in quarantine.jsonl")
    background: str = Field("#ffffff", pattern=r"^#[0-9a-fA-F]{6}$", description="colour behind transparency")
    max_pixels: int = Field(64_000_000, ge=1, le=89_000_000, description="largest picture; larger ones are refused")
    crop: Literal["center", "random", "content"] = Field(
        "center", description="place of the crop; content: from the picture's sha256, the same in every epoch"
    )
    flip: bool = Field(False, description="mirror half of the samples, left to right")
    bucket_step: int | None = Field(None, ge=1, description="multiple of the buckets' sides; none: only squares")
    bucket_max_aspect: float = Field(2.0, ge=1, le=16, description="largest ratio of the sides of a bucket")
    validation_pictures: int = Field(
        0, ge=0, description="number held out of training; 0: validation uses training pictures"
    )
    captions: Captions = Captions()

    @property
    def background_color(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue


class Sprites(Section):
    """Sprites of which scenes are composed."""

    source: str = Field(
        "",
        description="a folder with RGBA pictures and metadata.jsonl: file_name, name, style, ...; none with shapes = 1",
    )
    shapes: Fraction = Field(0.1, description="share of objects that are coloured shapes instead")


class Data(Section):
    """The data. Scenes are procedural: training reads scenes 0, 1, 2, ... of one seed, validation those of another."""

    kind: Literal["scenes", "sprites", "pictures"] = Field(
        "scenes", description="procedural scenes of shapes, or of sprites; or pictures of your own"
    )
    grey: bool = Field(False, description="one channel of luminance instead of three of colour")
    count: int = Field(50_000, ge=1, le=10**8, description="distinct scenes for the denoiser's training")
    mix: tuple[Fraction, Fraction, Fraction, Fraction, Fraction, Fraction] = Field(
        (0.24, 0.12, 0.18, 0.04, 0.3, 0.12),
        description="shares of single, two, counting, colors, position, binding",
    )
    sprites: Sprites = Sprites()
    pictures: Pictures = Pictures()

    @property
    def is_procedural(self) -> bool:
        """Whether pictures are made, not read."""
        return self.kind != "pictures"

    @model_validator(mode="after")
    def _check_source(self) -> Data:
        if self.kind == "pictures" and not self.pictures.source:
            raise ValueError("data.pictures.source is missing: give the pictures")
        if self.kind == "sprites" and not self.sprites.source and self.sprites.shapes < 1:
            raise ValueError("data.sprites.source is missing: give the folder of sprites, or shapes = 1 for none")
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> Data:
        if self.pictures.layout == "classes" and self.pictures.instance_prompt is not None:
            raise ValueError("data.pictures.instance_prompt has no effect where folders are the captions")
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> Data:
        if not sum(self.mix):
            raise ValueError("data.mix has no share above 0")
        return self


class Autoencoder(Section):
    """diffusers.AutoencoderKL; AutoencoderTiny, which learns the latents of another; or none: a pixel-space model."""

    kind: Literal["kl", "tiny", "identity"] = Field(
        "kl", description="kl: a VAE; tiny: a small one that learns from another; identity: none, pixels"
    )
    teacher: str = Field(
        "", description="for a tiny one: folder of the VAE to learn from, or of its model (none: the default model)"
    )
    block_out_channels: tuple[int, ...] = Field(
        (16, 32, 64), description="channels of each level; a level halves the sides"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks of each level")
    latent_channels: int = Field(4, ge=1, description="channels of the latents")
    norm_num_groups: int = Field(8, ge=1, description="groups of the normalisation")
    crop: int = Field(32, ge=8, description="side in pixels of the random crops for training")
    gradient_weight: float = Field(
        0.5, ge=0, description="weight of the error of spatial differences, which keeps edges sharp"
    )
    kl_weight: float = Field(1e-4, ge=0, description="weight of the posterior's divergence from the standard normal")
    latent_weight: float = Field(
        1.0, ge=0, description="for a tiny one: weight of the difference to the teacher's latents"
    )
    training: Training = Training()

    @model_validator(mode="after")
    def _check_kind(self) -> Autoencoder:
        if self.kind == "tiny" and len(set(self.block_out_channels)) > 1:
            raise ValueError("a tiny autoencoder requires equal block_out_channels")
        if self.kind != "tiny" and self.teacher:
            raise ValueError('teacher requires kind = "tiny"')
        return self


class Clip(Section):
    """open_clip towers; the text tower becomes the text encoder of the denoiser."""

    embed_dim: int = Field(128, ge=1, description="length of the common embedding")
    text_width: int = Field(128, ge=1, description="width of the text tower, which is the U-Net's context")
    text_layers: int = Field(3, ge=1, description="layers of the text tower")
    text_heads: int = Field(4, ge=1, description="heads of its attention")
    max_length: int = Field(32, ge=4, le=77, description="tokens, with start and end")
    merges: int | None = Field(
        None, ge=0, le=100_000, description="merges of the vocabulary, learnt from the captions (default: CLIP's)"
    )
    patch_size: int = Field(8, ge=1, description="side in pixels of a patch of the vision tower")
    vision_width: int = Field(128, ge=1, description="width of the vision tower")
    vision_layers: int = Field(4, ge=1, description="layers of the vision tower")
    vision_head_width: int = Field(32, ge=1, description="width of a head of its attention")
    training: Training = Training()


class Schedule(Section):
    """The noise schedule; `scaled_linear` is Stable Diffusion's."""

    kind: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = Field(
        "scaled_linear", description="course of the noise"
    )
    num_train_timesteps: int = Field(1000, ge=2, description="number of times")
    zero_terminal_snr: bool = Field(False, description="the last time has no signal (Lin et al. 2023)")


class Learning(Section):
    """How a denoiser is trained or fine-tuned: the objective's weights, times and noise, and what is cached."""

    weighting: Literal["uniform", "min_snr", "soft_min_snr", "p2"] = Field(
        "uniform", description="weight of the loss over noise levels"
    )
    snr_gamma: float | None = Field(None, gt=0, description="gamma of the weighting (default: 5, p2: 1)")
    noise_offset: float = Field(0.0, ge=0, description="deviation of a constant added to each channel's noise")
    input_perturbation: float = Field(
        0.0, ge=0, description="deviation of noise that is added to the input but not to the target"
    )
    times: Literal["uniform", "logit_normal"] = Field("uniform", description="distribution of noise levels")
    logit_mean: float = Field(0.0, ge=-10, le=10, description="mean of logit_normal; below 0 nearer to the picture")
    logit_std: float = Field(1.0, gt=0, le=10, description="standard deviation of logit_normal")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of samples whose caption is left out, for guidance"
    )
    tune_text_encoder: bool = Field(False, description="train the text encoder too")
    cache: bool = Field(
        True, description="encode pictures, and captions if the text encoder is frozen, once before training"
    )
    encode_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision in which the autoencoder encodes pictures"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, but a third more time")
    training: Training = Training()

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        if self.snr_gamma is not None and self.weighting == "uniform":
            raise ValueError("snr_gamma requires a weighting that is not uniform: min_snr, soft_min_snr or p2")
        if self.times == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std require times = logit_normal")
        return self


class DiT(Section):
    """A diffusion transformer, which learns classes: its captions are their names (Peebles & Xie 2023)."""

    patch_size: int = Field(2, ge=1, le=64, description="side of a patch in latents")
    layers: int = Field(6, ge=1, le=100, description="transformer blocks")
    heads: int = Field(4, ge=1, le=100, description="heads of the attention")
    head_width: int = Field(32, ge=4, le=256, description="channels of a head")


class Enlarging(Section):
    """A model that enlarges small pictures, which the U-Net reads beside its own, noised a little."""

    scale: int = Field(1, ge=1, le=16, description="pixels of a side for one of the small picture; 1: it draws instead")
    times: int = Field(350, ge=1, description="the small picture's noise is below this time, drawn anew each time")


class Editing(Section):
    """A model that makes one picture of another, which the U-Net reads beside its own (Brooks et al. 2023)."""

    source: str = Field("", description="a folder with the picture before, of the same name, for each picture")
    dropout: float = Field(0.05, ge=0, le=1, description="share of the pictures before that are left out, for guidance")


class Denoiser(Learning):
    """diffusers.UNet2DConditionModel or DiTTransformer2DModel, and the objective it is trained on."""

    network: Literal["unet", "dit"] = Field("unet", description="unet reads texts; dit reads classes, without CLIP")
    initial: str = Field("", description="a finished model to go on from: the denoiser is then the only stage")
    dit: DiT = DiT()
    enlarging: Enlarging = Enlarging()
    editing: Editing = Editing()
    inpainting: bool = Field(False, description="the U-Net reads a mask and the rest of the picture, and fills it in")
    posterior: Literal["sample", "mean"] = Field(
        "sample", description="latents are samples of the autoencoder's posterior, or its means, which have less noise"
    )
    block_out_channels: tuple[int, ...] = Field(
        (64, 128, 192), description="channels of each level; a level halves the sides"
    )
    attention: tuple[bool, ...] = Field(
        (False, True, True), description="which levels attend to the text, from the finest"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks of each level")
    num_heads: int = Field(4, ge=1, description="heads of the attention")
    norm_num_groups: int = Field(16, ge=1, description="groups of the normalisation")
    pooled_text: bool = Field(False, description="the pooled text also scales and shifts every residual block")
    prediction: Literal["epsilon", "sample", "v_prediction", "flow", "karras"] = Field(
        "epsilon", description="what the network predicts"
    )
    path: Literal["variance_preserving", "straight"] = Field(
        "variance_preserving", description="straight: a rectified flow, x_t = (1 - s) x0 + s noise"
    )
    shift: float = Field(1.0, gt=0, le=100, description="for a straight path: moves levels towards noise")
    schedule: Schedule = Schedule()
    preview_pictures: int = Field(24, ge=8, description="pictures of each category in a validation")
    distance_pictures: int = Field(
        0, ge=0, le=50_000, description="pictures of a validation for distances from real ones; 0: none"
    )


class Settings(Section):
    """The settings that every kind of run has."""

    name: str = Field(
        "model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the model and of its folder in runs/"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in the run")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="precision of the arithmetic; weights stay float32"
    )
    image_size: int = Field(64, ge=8, le=2048, description="side of the pictures in pixels")
    data: Data = Data()


class Config(Settings):
    """A whole model: data, autoencoder, CLIP and denoiser."""

    autoencoder: Autoencoder = Autoencoder()
    clip: Clip = Clip()
    denoiser: Denoiser = Denoiser()
    recommended: Recommended = Recommended()

    @model_validator(mode="after")
    def _check_steps(self) -> Config:
        if self.recommended.num_inference_steps > self.denoiser.schedule.num_train_timesteps:
            raise ValueError("recommended.num_inference_steps is more than denoiser.schedule.num_train_timesteps")
        return self

    @model_validator(mode="after")
    def _check_path(self) -> Config:
        denoiser = self.denoiser
        if denoiser.path == "straight" and denoiser.prediction == "v_prediction":
            raise ValueError("denoiser.prediction v_prediction requires a variance-preserving path; use flow")
        if denoiser.path == "straight" and denoiser.schedule.zero_terminal_snr:
            raise ValueError("zero_terminal_snr has no effect on a straight path, which ends in pure noise by itself")
        if denoiser.path != "straight" and denoiser.shift != 1:
            raise ValueError('denoiser.shift requires denoiser.path = "straight"')
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that train something, in order."""
        begun = bool(self.denoiser.initial)
        without = {"autoencoder": begun or self.autoencoder.kind == "identity", "clip": begun or not self.reads_texts}
        return tuple(stage for stage in STAGES if not without.get(stage))

    @property
    def reads_texts(self) -> bool:
        """Whether the denoiser reads texts, not classes."""
        return self.denoiser.network != "dit"

    @model_validator(mode="after")
    def _check_classes(self) -> Config:
        denoiser = self.denoiser
        if denoiser.network != "dit":
            if denoiser.dit != DiT():
                raise ValueError('denoiser.dit has no effect without denoiser.network = "dit"')
            return self
        if self.data.kind != "pictures":
            raise ValueError("denoiser.network dit learns classes: give pictures with their classes")
        if denoiser.tune_text_encoder or denoiser.distance_pictures:
            raise ValueError("a dit has no text encoder and no CLIP: no tune_text_encoder, no distance_pictures")
        return self

    @model_validator(mode="after")
    def _check_enlarging(self) -> Config:
        denoiser, enlarging = self.denoiser, self.denoiser.enlarging
        if enlarging.scale == 1:
            if enlarging != Enlarging():
                raise ValueError("denoiser.enlarging.times has no effect without denoiser.enlarging.scale")
            return self
        if self.image_size % enlarging.scale:
            raise ValueError(f"image_size must be a multiple of denoiser.enlarging.scale, {enlarging.scale}")
        if enlarging.times > denoiser.schedule.num_train_timesteps:
            raise ValueError("denoiser.enlarging.times is more than denoiser.schedule.num_train_timesteps")
        return self

    @model_validator(mode="after")
    def _check_pictures_beside(self) -> Config:
        denoiser, editing = self.denoiser, self.denoiser.editing
        reads = [denoiser.enlarging.scale > 1, bool(editing.source), denoiser.inpainting]
        if editing != Editing() and not editing.source:
            raise ValueError("denoiser.editing.dropout has no effect without denoiser.editing.source")
        if sum(reads) > 1:
            raise ValueError("denoiser allows only one of enlarging, editing and inpainting")
        if any(reads) and (not self.reads_texts or denoiser.tune_text_encoder or denoiser.distance_pictures):
            raise ValueError("a network that reads pictures is a unet, without tune_text_encoder and distance_pictures")
        if editing.source and self.data.kind != "pictures":
            raise ValueError("denoiser.editing requires pictures of your own, each with the picture before")
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> Config:
        pictures = self.data.pictures
        if self.data.kind == "pictures" and pictures.crop == "random" and self.denoiser.cache:
            raise ValueError(
                'random crops cannot be cached: set denoiser.cache = false, or data.pictures.crop = "content"'
            )
        if self.data.kind == "pictures" and pictures.streaming and not self.denoiser.cache:
            raise ValueError("a streamed data set requires denoiser.cache = true, since it is read in its own order")
        return self

    @model_validator(mode="after")
    def _check_clip_batch(self) -> Config:
        if self.data.is_procedural and self.clip.training.train_batch_size % 2:
            raise ValueError("clip.training.train_batch_size must be even: half of a batch are twins of the other half")
        return self


def load_config(path: Path | None, overrides: Sequence[Override] = ()) -> Config:
    """Read a TOML file, or take the defaults. Raises ConfigError.

    Overrides are `section.key=value` with TOML values, or (key, value).
    """
    return parse_config(read_tree(path, overrides), path.name if path else "config")


def read_tree(path: Path | None, overrides: Sequence[Override] = ()) -> dict[str, Any]:
    """The tables of a TOML file, or of none, with overrides. Raises ConfigError."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except OSError as error:
        raise ConfigError(f"cannot read config ({path}): {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path and path.name}: not valid TOML: {error}") from None
    for override in overrides:
        _set(tree, *(parsed_override(override) if isinstance(override, str) else override))
    return tree


def own_pictures(source: str) -> list[tuple[str, Any]]:
    """Overrides for a data set of the user's own."""
    return [("data.kind", "pictures"), ("data.pictures.source", source)]


def save_config(config: Settings, path: Path) -> None:
    """Write the effective config, defaults included, as TOML that `load_config` reads."""
    write_text(path, tomli_w.dumps(config.model_dump(exclude_none=True)))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """A validated Config; see `parsed`."""
    return parsed(Config, tree, source)


def parsed(kind: type[AnySettings], tree: dict[str, Any], source: str = "config") -> AnySettings:
    """Validate a nested dictionary. Raises ConfigError for the first fault, with its key and value."""
    try:
        config = kind.model_validate(_with_tuples(tree))
    except ValidationError as error:
        fault = first_fault(error)
        if fault.unknown:
            raise ConfigError(f'{source}: unknown key "{fault.key}"{_suggestion(kind, fault.path)}') from None
        if not fault.path:
            raise ConfigError(f"{source}: {fault.message}") from None
        text = f'{source}: key "{fault.key}": {fault.message}'
        raise ConfigError(text if fault.missing else f"{text} (got {repr(fault.got)[:60]})") from None
    _check_text(config, source)
    return config


def _check_text(config: Settings, source: str) -> None:
    """Raises ConfigError for text that is not valid UTF-8, which paths and arguments may be but TOML may not."""
    for key, value in flat(config).items():
        try:
            " ".join(map(str, value if isinstance(value, tuple) else (value,))).encode()
        except UnicodeEncodeError:
            raise ConfigError(f'{source}: key "{key}" is not valid UTF-8 (got {value!r})') from None


def flat(config: Settings) -> dict[str, Any]:
    """All values by their dotted keys."""
    values: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                values[prefix + key] = value

    walk(config.model_dump(), "")
    return values


def parsed_override(override: str) -> tuple[str, Any]:
    """(key, value) of `key=value`, whose value is TOML or a bare word. Raises ConfigError."""
    key, sign, value = override.partition("=")
    if not sign:
        raise ConfigError(f"override {override!r} is not key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value  # a bare word is a string
    except ValueError:
        raise ConfigError(f"override {override[:60]!r}... is a number of too many digits") from None
    except RecursionError:
        raise ConfigError(f"override {override[:60]!r}... is nested too deeply") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override of {key!r}: {section} is not a section")
    tree[name] = value


def _with_tuples(value: Any) -> Any:
    """Lists become tuples: TOML has only lists, a frozen config only tuples."""
    if isinstance(value, dict):
        return {k: _with_tuples(v) for k, v in value.items()}
    return tuple(_with_tuples(v) for v in value) if isinstance(value, list) else value


def _suggestion(kind: type[Settings], parts: Sequence[str]) -> str:
    *sections, name = parts
    section: type[BaseModel] = kind
    for part in sections:  # parents are known keys: an unknown parent would be the fault itself
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        section = annotation
    return did_you_mean(name, section.model_fields)
