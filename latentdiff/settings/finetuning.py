"""The settings of a fine-tuning: the model, the pictures and the method. Read from TOML, like configs.

full               all weights of the U-Net, optionally of the text encoder
lora               low-rank factors beside the weights of attention (Hu et al. 2021), optionally of convolutions
dreambooth         a new word for one thing, and pictures of its class (Ruiz et al. 2023); with a rank as LoRA
textual-inversion  only the embeddings of a new word (Gal et al. 2022)
controlnet         a ControlNet that reads an annotator's picture of each picture (Zhang et al. 2023)
ip-adapter         an IP-Adapter, which draws by a picture as by a prompt (Ye et al. 2023)
consistency        a student that draws in few steps without guidance (Luo et al. 2023); with a rank as LoRA
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from latentdiff.core.annotators import ANNOTATORS
from latentdiff.settings.config import Data, Learning, Override, Section, Settings, parsed, read_tree
from latentdiff.settings.validation import one_of

STAGE = "finetune"  # the only stage of such a run
FILE = "finetune.toml"  # the effective settings, in the run's folder
RANK = 16
_BESIDE = ("controlnet", "ip-adapter")  # methods that train a network beside the model
_EITHER = ("dreambooth", "consistency")  # methods that train factors if there is a rank, else all weights
_OF_MANY = ("full", "lora", "consistency", *_BESIDE)  # methods that learn from many different pictures
SMALL = 100e6  # parameters of a U-Net below which it is small; Stable Diffusion 1 has 860 million, the default model 7
TEMPLATES = ("{}", "a {}", "a photo of {}", "a picture of a {}")  # captions for pictures of a new word
Method = Literal["full", "lora", "dreambooth", "textual-inversion", "controlnet", "ip-adapter", "consistency"]
Scale = Annotated[float, Field(ge=1, le=100)]
PromptText = Annotated[str, Field(min_length=1, max_length=10_000)]


class Lora(Section):
    """The factors of LoRA: W + scale B A, scale alpha / rank, or alpha / sqrt(rank) with rslora."""

    rank: int | None = Field(
        None, ge=1, le=1024, description=f"default {RANK}; dreambooth and consistency train all weights without one"
    )
    alpha: float | None = Field(None, gt=0, description="default: the rank, so that the scale is 1")
    rslora: bool = Field(False, description="Kalajdzievski 2023: high ranks learn as fast as low ones")
    dora: bool = Field(
        False, description="Liu et al. 2024: lengths of the rows are trained separately from their directions"
    )
    convolutions: bool = Field(False, description="also factors for convolutions")
    kohya: bool = Field(False, description="also write the adapter under kohya's names, as always with convolutions")


class Prior(Section):
    """Pictures of the class, drawn by the model before training, which preserve what it knows."""

    prompt: PromptText | None = Field(None, description='"a dog", if the instance is "a sks dog"')
    source: str = Field("", description="a folder of class pictures, instead of drawn ones")
    pictures: int = Field(100, ge=1, le=100_000, description="number of class pictures that are drawn")
    weight: float = Field(1.0, ge=0, le=1000, description="weight of their loss")


class Word(Section):
    """The word of a textual inversion."""

    token: Annotated[str, Field(max_length=60, pattern=r"^[^/\s]*$")] = Field("", description="the new word")
    initial: Annotated[str, Field(max_length=200)] = Field("", description="words that its vectors begin as")
    vectors: int = Field(1, ge=1, le=64, description="number of its vectors")


class Control(Section):
    """The picture that a ControlNet reads."""

    source: str = Field("", description="a folder with a picture of the same name for each training picture")
    annotator: str | None = Field(
        None, description=f"what makes it from a picture: {', '.join(ANNOTATORS)}; none: canny, or a source as it is"
    )

    @property
    def made_by(self) -> str | None:
        """The annotator that is used; None if the source's pictures are read as they are."""
        return self.annotator or (None if self.source else "canny")

    @field_validator("annotator")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else one_of("annotator", tuple(ANNOTATORS), value)


class ImagePrompt(Section):
    """The training of an IP-Adapter."""

    encoder: str = Field(
        "", description="a folder of CLIP's image tower in transformers' format; none: the model's own CLIP"
    )
    dropout: float = Field(0.1, ge=0, le=1, description="share of the samples without a visible picture")


class Consistency(Section):
    """A student of a model's own guided paths, which draws in few steps."""

    objective: Literal["lcm", "ect", "mean-flow"] = Field(
        "lcm",
        description="lcm: the teacher's steps (Luo et al. 2023); ect: the data's own (Geng et al. 2024); mean-flow:"
        " average velocities, for straight paths, without a rank (Geng et al. 2025)",
    )
    guidance: float | None = Field(
        None, ge=1, le=100, description="the teacher's guidance_scale, which the student has inside; none: the model's"
    )
    guidance_range: tuple[Scale, Scale] | None = Field(
        None, description="the student reads its guidance_scale, trained between these two; without a rank only"
    )
    steps: int = Field(50, ge=2, le=1000, description="lcm: levels of the grid whose neighbours the loss compares")
    shrink: float = Field(
        24, ge=2, le=10_000, description="ect: q: the larger, the nearer two levels are; 256 for a million samples"
    )
    huber: float = Field(0.001, gt=0, le=10, description="c of the pseudo-Huber distance")


_WITHOUT_EFFECT = {"lcm": ("shrink",), "ect": ("steps",), "mean-flow": ("steps", "shrink", "huber", "guidance_range")}


class Previews(Section):
    """The pictures of a validation: every prompt from the same noise each time."""

    prompts: tuple[PromptText, ...] = Field((), max_length=64, description="default: captions of validation pictures")
    count: int = Field(8, ge=1, le=64, description="number of those captions")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the noise")
    num_inference_steps: int = Field(20, ge=1, le=1000, description="sampling steps; for a student of few steps 4")


class FineTuning(Settings):
    """One fine-tuning. image_size 0 stands for the model's size."""

    name: str = Field(
        "finetune", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its model"
    )
    model: str = Field("", description="a folder, a .safetensors file or a hub id; none is the default model")
    variant: str | None = Field(None, description="variant of the model's weights: fp16, ...")
    revision: str | None = Field(None, description="revision of a hub id")
    method: Method = Field("lora", description="what is trained")
    quantize: Literal["int8", "fp8", "q8_0", "q4_0"] | None = Field(
        None, description="kind of the frozen weights, with fewer bits; only for methods that leave weights frozen"
    )
    image_size: int = Field(0, ge=0, le=2048, description="side of the pictures in pixels; 0: the model's")
    data: Data = Data()
    finetune: Learning = Learning()
    lora: Lora = Lora()
    prior: Prior = Prior()
    word: Word = Word()
    control: Control = Control()
    image_prompt: ImagePrompt = ImagePrompt()
    consistency: Consistency = Consistency()
    previews: Previews = Previews()

    @property
    def low_rank(self) -> bool:
        """Whether factors are trained instead of weights."""
        return self.method == "lora" or (self.method in _EITHER and self.lora.rank is not None)

    @property
    def allows_quantized(self) -> bool:
        """Whether the model's own weights stay frozen, and are not copied into the network that is trained."""
        return (self.low_rank and not self.lora.dora) or self.method == "textual-inversion"

    @model_validator(mode="after")
    def _check_data(self) -> FineTuning:
        if self.data.kind != "pictures":
            raise ValueError("data.pictures.source is missing: give the pictures")
        if self.data.pictures.crop == "random" and self.finetune.cache:
            raise ValueError(
                'random crops cannot be cached: set finetune.cache = false, or data.pictures.crop = "content"'
            )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> FineTuning:
        """Refuse a setting that has no effect, and a method without a setting that it requires."""
        if self.method == "dreambooth" and self.prior.prompt is None:
            raise ValueError('dreambooth requires prior.prompt (--class-prompt), the class in a few words, "a dog"')
        if self.method == "textual-inversion" and not self.word.token:
            raise ValueError("textual-inversion requires word.token (--token), the new word")
        if self.method == "textual-inversion" and (self.prior.prompt or self.finetune.tune_text_encoder):
            raise ValueError("textual-inversion trains only a word's vectors: no prior, no text encoder")
        if self.method != "textual-inversion" and self.word != Word():
            raise ValueError('word has no effect without method = "textual-inversion"')
        if not self.low_rank and self.lora != Lora():
            why = "lora.rank (--rank)" if self.method in _EITHER else "method lora, dreambooth or consistency"
            raise ValueError(f"lora has no effect on {self.method}: it requires {why}")
        if self.quantize and not self.allows_quantized:
            raise ValueError("quantize requires frozen weights: a rank without dora, or textual-inversion")
        if self.quantize and self.finetune.tune_text_encoder:
            raise ValueError("quantize does not allow tune_text_encoder: the text encoder's weights are frozen too")
        if self.lora.rslora and self.lora.kohya:
            raise ValueError("kohya's format has no rslora: its scale is alpha / rank")
        return self

    @model_validator(mode="after")
    def _check_controls(self) -> FineTuning:
        if self.method != "controlnet" and self.control != Control():
            raise ValueError('control has no effect without method = "controlnet"')
        if self.method != "ip-adapter" and self.image_prompt != ImagePrompt():
            raise ValueError('image_prompt has no effect without method = "ip-adapter"')
        if self.method in _BESIDE and (self.prior.prompt or self.finetune.tune_text_encoder):
            raise ValueError(f"{self.method} trains only a network beside the model: no prior, no text encoder")
        return self

    @model_validator(mode="after")
    def _check_students(self) -> FineTuning:
        if self.method != "consistency" and self.consistency != Consistency():
            raise ValueError('consistency has no effect without method = "consistency"')
        if self.method == "consistency" and (self.prior.prompt or self.finetune.tune_text_encoder):
            raise ValueError("consistency distils the backbone alone: no prior, no text encoder")
        if self.method == "consistency" and (self.finetune.weighting != "uniform" or self.finetune.input_perturbation):
            raise ValueError("consistency has no weighting of noise levels and no input_perturbation")
        objective, usual = self.consistency.objective, Consistency()
        for name in _WITHOUT_EFFECT[objective]:
            if getattr(self.consistency, name) != getattr(usual, name):
                raise ValueError(f'consistency.{name} has no effect on objective = "{objective}"')
        if objective != "lcm" and self.finetune.times != "uniform":
            raise ValueError(f'consistency with objective = "{objective}" has its own times')
        if objective == "mean-flow" and self.low_rank:
            raise ValueError('consistency with objective = "mean-flow" adds a layer: it has no rank')
        return self

    @model_validator(mode="after")
    def _check_scales(self) -> FineTuning:
        scales = self.consistency.guidance_range
        if scales is not None and (self.low_rank or self.consistency.guidance is not None):
            raise ValueError("consistency.guidance_range adds a layer: it has no rank and no consistency.guidance")
        if scales is not None and scales[0] > scales[1]:
            raise ValueError("consistency.guidance_range must be two rising numbers")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> FineTuning:
        """Refuse settings without effect that every method has."""
        if self.prior.prompt is None and self.prior != Prior():
            raise ValueError("prior requires prior.prompt (--class-prompt), the class")
        if self.prior.source and self.prior.pictures != Prior().pictures:  # a saved config has it
            raise ValueError("prior.pictures has no effect with prior.source, which has its own")
        instance = self.data.pictures.instance_prompt
        if self.method == "textual-inversion" and instance is not None and self.word.token not in instance:
            raise ValueError(f"the instance prompt must contain {self.word.token}, or the word learns nothing")
        return self


def load_finetuning(path: Path | None, overrides: tuple[Override, ...] = (), unet_parameters: float = 0) -> FineTuning:
    """A TOML file, or none, with overrides, over the defaults of its method and model. Raises ConfigError."""
    tree = read_tree(path, overrides)
    source = path.name if path else "finetune"
    method = parsed(FineTuning, tree, source)
    return parsed(FineTuning, _merged(defaults(method, small=unet_parameters < SMALL), tree), source)


def defaults(config: FineTuning, *, small: bool) -> dict[str, Any]:
    """The defaults of each method; the manual gives the reasons.

    small: the learning rates are ten times as large; the papers' are for Stable Diffusion's 860 million weights.
    """
    factors = config.low_rank
    rates = {
        "full": (1e-5, 2e-4),
        "lora": (1e-4, 1e-3),
        "dreambooth": (1e-4, 2e-4) if factors else (2e-6, 2e-5),
        "textual-inversion": (5e-4, 5e-3),
        "controlnet": (1e-5, 2e-4),
        "ip-adapter": (1e-4, 1e-3),
        "lcm": (1e-4, 5e-5) if factors else (1e-6, 1e-5),  # a small student diverges at ten times this rate
        "ect": (1e-4, 1e-3) if factors else (1e-6, 1e-4),
        "mean-flow": (1e-5, 1e-4),
    }
    method = config.consistency.objective if config.method == "consistency" else config.method
    own = config.finetune.training
    steps = {"dreambooth": 400, "textual-inversion": 1000, **dict.fromkeys(_BESIDE, 5000)}.get(config.method, 2000)
    steps = own.max_train_steps if "max_train_steps" in own.model_fields_set else steps
    training: dict[str, Any] = {
        "learning_rate": rates[method][small],
        "max_train_steps": steps,
        "train_batch_size": (16 if small else 4) if config.method in _OF_MANY else 4 if small else 1,
        "lr_schedule": "constant" if config.method == "textual-inversion" else "trapezoid",
        "lr_warmup_steps": min(100, steps // 10),
        "weight_decay": 0.0 if config.method == "textual-inversion" else 0.01,
        "validation_steps": max(1, steps // 4),
        "checkpointing_steps": 250,
        "ema_decay": 0.99,
    }
    # every picture shows the new word; networks beside the model learn to do without the prompt (ControlNet, 3.4)
    dropout = 0.5 if config.method in _BESIDE else 0.1 if config.method in _OF_MANY else 0.0
    tree: dict[str, Any] = {"finetune": {"caption_dropout": dropout, "training": training}}
    if config.method == "consistency":
        tree["previews"] = {"num_inference_steps": 4}
    if config.method == "textual-inversion":
        tree["data"] = {"pictures": {"layout": "uncaptioned", "instance_prompt": config.word.token}}
        tree["data"]["pictures"]["captions"] = {"templates": list(TEMPLATES)}
    if factors:
        rank = config.lora.rank or RANK
        tree["lora"] = {"rank": rank, "alpha": float(rank)}
    return tree


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables; values of `above` replace those of `below`."""
    tree = dict(below)
    for key, value in above.items():
        under = tree.get(key)
        tree[key] = _merged(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return tree
