"""Prompt to images: text encoder, guided sampling, autoencoder, in one object.

pipe = LatentDiffusionPipeline.from_pretrained()
pipe("a red circle above a blue square", seed=7).images[0].save("scene.png")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from latentdiff.core.arrays import Array, as_tensor, library, to_numpy
from latentdiff.core.errors import ConfigError, NonFiniteError
from latentdiff.core.images import luminance, to_uint8, to_values
from latentdiff.diffusion.path import Path as NoisePath
from latentdiff.diffusion.samplers import Step
from latentdiff.drawing import extras, given
from latentdiff.drawing.job import NOTHING, Job, Own, jobs_of
from latentdiff.drawing.plan import enlarged, step_counts
from latentdiff.drawing.record import ImageMetadata, installed_versions
from latentdiff.drawing.request import SIDES, Request, check_size, request

if TYPE_CHECKING:
    import torch

    from latentdiff.drawing.canvas import Canvas
    from latentdiff.drawing.texts import Known
    from latentdiff.networks.backbones.unet import UNet
    from latentdiff.networks.codecs.kl import Autoencoder, IdentityAutoencoder
    from latentdiff.networks.encoders.clip import TextEncoder
    from latentdiff.networks.encoders.two_clips import DualTextEncoder
    from latentdiff.runtime.speed import Speed

    Networks = tuple[Autoencoder | IdentityAutoencoder, TextEncoder | DualTextEncoder, UNet]

Runtime = Literal["torch", "openvino"]
LARGEST_KNOWN = 256  # texts; a context of Stable Diffusion takes a quarter of a megabyte
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Output:
    """The pictures of one call, in the order of their seeds, a record of each, and what there is to know of them."""

    images: Any
    seeds: list[int]
    metadata: list[ImageMetadata]
    notes: list[str] = field(default_factory=list)

    def save(self, target: str | Path) -> list[Path]:
        """Write PIL images as the command line does, each with its record: into a folder, or a single one to a file.

        Returns the paths. Raises ConfigError for a file that is there, and for other output types.
        """
        from latentdiff.drawing.files import check_target, write_pictures

        if not isinstance(self.images, list):
            raise ConfigError("only PIL images are saved (output_type)")
        path = extras.path_of(target)
        check_target(path, len(self.images))
        return [written for written, _ in write_pictures(self, path, ".png", metadata=True)]


@dataclass(frozen=True)
class ModelCard:
    """What a model says beside its weights: name, hash, size in pixels, recommended settings, where it came from."""

    name: str = "model"
    hash: str = ""
    size: tuple[int, int] = (64, 64)
    defaults: dict[str, Any] = field(default_factory=dict)
    source: str | None = None  # a path or hub id as it was named; None is the default model
    variant: str | None = None  # of its weights
    folder: Path | None = field(default=None, compare=False)  # where the model lies, unless it is a single file


@dataclass(frozen=True)
class Compiled:
    """What is to be known of networks that OpenVINO has compiled.

    begin: lets them get ready for latents (B, C, h, w) under so many conditions, with or without deep features to be
    used again. torch_networks: those that take over when something is asked for that only torch has, unless OpenVINO
    was asked for by name; torch_speed: at which they are to draw.
    """

    begin: Callable[[tuple[int, ...], int, bool], None]
    torch_networks: Callable[[], Networks] | None
    torch_speed: Speed = "exact"


class LatentDiffusionPipeline:
    """Networks, a noise schedule and what the network predicts; everything else is an argument of the call.

    extras: what was loaded beside the model. compiled: of networks that are not torch's, and compute on NumPy arrays.
    speed: see `runtime.speed`; what it asks for is done when the first picture is drawn.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | IdentityAutoencoder,
        text_encoder: TextEncoder | DualTextEncoder,
        unet: UNet,
        path: NoisePath,
        prediction: str,
        card: ModelCard,
        *,
        compiled: Compiled | None = None,
        speed: Speed = "exact",
    ):
        self.autoencoder, self.text_encoder, self.unet = autoencoder, text_encoder, unet
        self.path, self.prediction, self.card = path, prediction, card
        self._compiled, self.speed, self._sped_up = compiled, speed, False
        self._texts: Known = {}
        self.extras = extras.Extras()
        self._place: torch.device | None = None
        self._notes: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """A network that is put in place of another's: what was kept of that is let go, and the others are torch's."""
        if name in ("autoencoder", "text_encoder", "unet") and "_notes" in self.__dict__:
            self.change("another network")
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        runtime: str = "auto",
        speed: str | None = None,
    ) -> LatentDiffusionPipeline:
        """The model of a folder in diffusers' layout, of a single .safetensors file or of a hub id.

        Without a path, the default model inside the package. A hub id is fetched once, at `revision`. runtime: see
        `latentdiff.runtime.choice`; speed: exact, fast or max, see `latentdiff.runtime.speed`. By torch on CUDA where
        there is one, float32 by default. Raises ModelError, UnsafeError, ConfigError.
        """
        from latentdiff.runtime import choice as runtimes

        return runtimes.load(
            path, runtime=runtime, device=device, dtype=torch_dtype, variant=variant, revision=revision, speed=speed
        )

    @classmethod
    def from_single_file(cls, path: str | Path, **settings: Any) -> LatentDiffusionPipeline:
        """The model of a .safetensors file in the original layout of Stable Diffusion; see `from_pretrained`."""
        return cls.from_pretrained(path, **settings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that this class and diffusers' pipelines load."""
        from latentdiff.families.pretrained import save_pipeline

        self.in_torch("saving")
        save_pipeline(self, extras.path_of(directory))

    @property
    def components(self) -> dict[str, Any]:
        """The parts, by diffusers' names."""
        self.in_torch("components")
        return {
            "vae": self.autoencoder,
            "text_encoder": self.text_encoder,
            "tokenizer": self.text_encoder.tokenizer,
            "unet": self.unet,
        }

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusionPipeline:
        """Move the networks and what was loaded beside them; returns itself. Raises ConfigError."""
        from latentdiff.runtime.device import check_dtype, usable_device

        if self.runtime != "torch" and dtype is None and str(device) in ("cpu", "None"):
            return self
        self.change("moving")
        device = None if device is None else usable_device(device)
        check_dtype(dtype)
        for network in (self.autoencoder, self.text_encoder, self.unet):
            network.to(device=device, dtype=dtype)
        if self.extras.weaker is not None:
            self.extras.weaker.to(device, dtype)
        if self.extras.scorer is not None:
            self.extras.scorer.to(device=device)
        return self

    def offload(self, device: str | torch.device, *, layers: bool = False) -> LatentDiffusionPipeline:
        """Keep the networks in the CPU's memory and compute on `device`; returns itself.

        Each network is moved there when its turn comes; with `layers` each of its layers, slower, for the least memory.
        """
        from latentdiff.runtime.offload import offload

        self.change("offloading")
        self._place = offload(self.text_encoder, self.unet, self.autoencoder, device=device, layers=layers)
        return self

    def enable_model_cpu_offload(self, device: str = "cuda") -> None:
        """See `offload`, under diffusers' name."""
        self.offload(device)

    def enable_sequential_cpu_offload(self, device: str = "cuda") -> None:
        """See `offload`, under diffusers' name."""
        self.offload(device, layers=True)

    def texts(self) -> Known:
        """Contexts of the prompts drawn last, to which more are added.

        None are kept of torch's networks as written: they are open to whoever trains them.
        """
        alone = self.runtime == "torch" and self.speed == "exact"
        if alone or len(self._texts) >= LARGEST_KNOWN:
            self._texts.clear()
        return self._texts

    def change(self, wanted: str) -> None:
        """Make ready to be changed: the networks are torch's (see `in_torch`), as written, and know no text."""
        self.in_torch(wanted)
        self._texts.clear()
        if self._sped_up:
            from latentdiff.runtime.speed import slow_down

            slow_down(self)
            self._sped_up = False

    def in_torch(self, wanted: str) -> None:
        """Let torch's networks take over from another runtime's, for what only they have, and say so.

        Raises ConfigError where the other runtime was asked for by name.
        """
        if self._compiled is None:
            return
        if self._compiled.torch_networks is None:
            raise ConfigError(f"{wanted} needs the torch runtime; {self.runtime} was asked for by name")
        warnings.warn(f"{wanted} is not in what was exported: drawing with torch instead", stacklevel=3)
        networks, self.speed = self._compiled.torch_networks(), self._compiled.torch_speed
        self._compiled = None
        self.autoencoder, self.text_encoder, self.unet = networks

    @property
    def runtime(self) -> Runtime:
        """What the networks compute with."""
        return "torch" if self._compiled is None else "openvino"

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        import torch

        if self.runtime != "torch":
            return torch.device("cpu")
        return self._place or next(self.unet.parameters()).device

    def array(self, values: Array) -> Array:
        """NumPy values, or a tensor, where the networks compute and as they take them."""
        if self.runtime != "torch":
            return to_numpy(values)
        import torch

        return torch.as_tensor(values).to(self.device)

    @property
    def image_channels(self) -> int:
        """3 for colour, 1 for grey."""
        return self.autoencoder.image_channels

    @property
    def multiple(self) -> int:
        """What the sides of pictures must be multiples of, in pixels."""
        return self.autoencoder.factor * self.unet.factor

    def request(self, prompt: str, **settings: Any) -> Request:
        """A validated request with the model's recommended settings where none are given."""
        asked = request(prompt=prompt, **{**self.card.defaults, **settings})
        if asked.num_inference_steps > self.path.T:
            raise ConfigError(f"num_inference_steps: the model has {self.path.T} (got {asked.num_inference_steps})")
        self._check(asked)
        return asked

    def _check(self, asked: Request) -> None:
        """Refuse what this model has nothing to do with."""
        if (asked.original_size or asked.crop != (0, 0)) and not self.unet.reads_sizes:
            raise ConfigError("original_size and crop are told to SDXL alone; this model reads no sizes")
        if asked.pag_scale:
            self.in_torch("perturbed attention")
        if asked.pag_scale and not self.unet.can_be_perturbed:
            raise ConfigError("pag_scale: this model has no self-attention in its middle block")
        if asked.autoguidance_scale != 1 and self.extras.weaker is None:
            raise ConfigError("autoguidance_scale needs a weaker model (load_weaker, --weaker)")
        if asked.clip_guidance_scale and self.extras.scorer is None:
            self.load_clip()
        if asked.vae_tiling:
            self.in_torch("vae_tiling")
        if asked.cache_interval > 1 and not self.unet.has_deep:
            raise ConfigError("cache_interval: this model has one level, and nothing below it to be used again")

    def load_clip(self, directory: str | Path | None = None) -> None:
        """See `extras.load_clip`."""
        extras.load_clip(self, None if directory is None else extras.path_of(directory))

    def load_weaker(self, path: str | Path) -> None:
        """See `extras.load_weaker`."""
        extras.load_weaker(self, extras.path_of(path))

    def load_vae(self, path: str | Path) -> None:
        """See `extras.load_vae`."""
        extras.load_vae(self, extras.path_of(path))

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, weight: float = 1.0, fuse: bool = False
    ) -> extras.Fit:
        """An adapter beside the networks, or with `fuse` in their weights; returns how it fits.

        Of PEFT's, diffusers' or kohya's names; LoHa and LoKr can only be fused. Raises ModelError, ConfigError.
        """
        return extras.load_adapter(self, extras.path_of(path), name=adapter_name, weight=weight, merged=fuse)

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Make these adapters the active ones, with one weight or one each."""
        extras.weigh_adapters(self, extras.names_and_weights(names, weights))

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the active adapters to the weights: as fast as without them, and not to be undone."""
        extras.merge_adapters(self, lora_scale)

    def unload_lora_weights(self) -> None:
        """Take off every adapter that is not fused."""
        extras.unload_adapters(self)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Learnt words, which a prompt may then use; returns them."""
        return extras.load_words(self, extras.path_of(path), token)

    def canvas(self, asked: Request, image: Any, mask: Any = None, **more: Any) -> Canvas | None:
        """The picture that a request starts from, if one is given; see `drawing.canvas`. Raises ConfigError."""
        from latentdiff.drawing.canvas import canvas

        if image is None:
            if mask is not None or any(more.get("margins", ())):
                raise ConfigError("a mask or an outpainting needs an image")
            if asked.strength is not None:
                raise ConfigError("strength is of a given image, and there is none")
            return None
        if asked.hires_scale:
            raise ConfigError("hires_scale is of pictures from noise. With an image, width and height enlarge it")
        lowest = min(*SIDES, *self.card.size)
        for name, side in (("height", asked.height), ("width", asked.width)):
            if side is not None:
                check_size(name, side, self.multiple, lowest)
        made = canvas(image, mask, size=(asked.height, asked.width), multiple=self.multiple, **more)
        self.size(asked, made)
        step_counts(asked, made)
        return made

    def begin(self, asked: Request, pictures: int = 1) -> None:
        """Let the networks get ready for a request's first batch while its prompts are read; torch's are."""
        if self._compiled is not None:
            latents = (min(pictures, asked.batch_size), *self.latent_shape(self.size(asked)))
            self._compiled.begin(latents, 2 if asked.guidance_scale > 1 else 1, asked.cache_interval > 1)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        image: Any = None,
        mask_image: Any = None,
        outpaint: Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Any = None,
        generator: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        **settings: Any,
    ) -> Output:
        """Draw `num_images_per_prompt` pictures of each prompt; picture i of the call has seed `seed + i`.

        prompt: one or several; the empty one draws as without captions.
        image: a PIL image or uint8 (H, W, 3) to start from; mask_image: of its size, white is drawn anew and the rest
        is returned unchanged; outpaint: pixels to add on the (left, top, right, bottom).
        settings: height, width, num_inference_steps, guidance_scale, sampler, strength, seed and others of `Request`.
        latents: initial noise (N, C, h, w), generator: torch's, one or N, instead of the keyed noise.
        prompt_embeds: contexts (B, L, D) instead of prompts, B of them, and their likes as in diffusers.
        output_type: "pil", "np" (uint8 (N, H, W, 3)), "pt" ((N, 3, H, W) in [-1, 1]) or "latent".
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"unknown output_type {output_type!r}; one of {', '.join(OUTPUT_TYPES)}")
        if "num_images" in settings:
            raise ConfigError("num_images is num_images_per_prompt here")
        if "callback_on_step_end" in settings:
            raise ConfigError("instead of a callback, `stream` yields every step, for the body of a loop")
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ConfigError(f"{name}_embeds stand for the {name}: give one of both")
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        contexts = given.contexts_of(*embeds, width=self.unet.context_width, with_pooled=self.unet.reads_sizes)
        prompts = ["(embeddings)"] * len(contexts) if contexts else given.prompts_of(prompt)
        fields = {**settings, "num_images": num_images_per_prompt, "negative_prompt": negative_prompt or ""}
        margins = given.margins_of(outpaint)
        jobs: list[Job] = []
        for index, one in enumerate(prompts):
            asked = self.request(one, **fields)
            canvas = jobs[0].canvas if jobs else self.canvas(asked, image, mask_image, margins=margins)
            made = jobs_of(asked, canvas)
            jobs += [replace(job, own=contexts[index]) for job in made] if contexts else made
            fields["seed"] = asked.seed + num_images_per_prompt  # the next prompt goes on counting
        shape = (len(jobs), *self.latent_shape(self.size(jobs[0].request, jobs[0].canvas)))
        own = given.own_of(latents, generator, shape, self.array)
        return _joined(list(self.batches(jobs, output_type, own)))

    def batches(self, jobs: Sequence[Job], output_type: str = "pil", own: Own = NOTHING) -> Iterator[Output]:
        """The pictures of jobs, a batch at a time."""
        first = 0
        for batch in self.grouped(jobs):
            for step in self.steps(batch, own.of(first, len(batch))):
                final = step.x
            yield self.finish(batch, final, output_type, own=bool(own))
            first += len(batch)

    def grouped(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs in batches, in their order; together are those that differ in prompt, seed and picture only."""
        from latentdiff.drawing.texts import chunks_of

        def alike(job: Job) -> tuple[Any, ...]:
            canvas = job.canvas and (job.canvas.pixels.shape, job.canvas.size, job.canvas.mask is None)
            return job.settings, canvas, chunks_of(job, self.text_encoder), job.own is None

        for _, group in groupby(jobs, alike):
            same = list(group)
            size = same[0].request.batch_size
            yield from (same[first : first + size] for first in range(0, len(same), size))

    def stream(
        self, prompt: str, *, image: Any = None, mask_image: Any = None, outpaint: Any = None, **settings: Any
    ) -> Iterator[Step]:
        """Every sampling step of one prompt's first batch: `step.x`, `step.x0` are latents; `decode` shows them."""
        asked = self.request(prompt, **settings)
        canvas = self.canvas(asked, image, mask_image, margins=given.margins_of(outpaint))
        yield from self.steps(next(self.grouped(jobs_of(asked, canvas))))

    def steps(self, jobs: Sequence[Job], own: Own = NOTHING) -> Iterator[Step]:
        """Sample jobs of one batch together, yielding each step; of two passes the second's follow the first's."""
        from latentdiff.drawing.passes import passes

        asked = jobs[0].request
        if self.runtime == "torch" and self.speed != "exact" and not self._sped_up:
            from latentdiff.runtime.speed import speed_up

            speed_up(self, self.speed)
            self._sped_up = True
        self.autoencoder.piecewise(tiles=asked.vae_tiling, slices=asked.vae_slicing)
        yield from passes(self, jobs, own)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of a picture of (height, width)."""
        factor = self.autoencoder.factor
        return self.autoencoder.latent_channels, size[0] // factor, size[1] // factor

    def finish(self, jobs: Sequence[Job], latents: Array, output_type: str = "pil", *, own: bool = False) -> Output:
        """Decode final latents and record how each picture was made. Raises NonFiniteError."""
        seeds = [job.seed for job in jobs]
        images: Any = latents if output_type == "latent" else self.decode(latents)
        if not (_all_finite(latents) and _all_finite(images)):
            what = "sampling" if not _all_finite(latents) else "decoding"
            raise NonFiniteError(f"{what} gave non-finite numbers (seeds {seeds}). Try float32 or less guidance")
        if output_type != "latent":
            images = self._kept(images, [job.canvas for job in jobs])
        if output_type in ("pil", "np"):
            images = to_uint8(images)
        elif self.runtime != "torch":
            images = as_tensor(images)
        if output_type == "pil":
            images = [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in images]
        records = [self.record(job, own, (place, len(jobs))) for place, job in enumerate(jobs)]
        notes, self._notes = self._notes, []
        return Output(images, seeds, records, notes)

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) encoded to the posterior's mean and decoded again."""
        return to_uint8(self.decode(self.encode_images(self.as_images(pictures))))

    def as_images(self, pictures: np.ndarray) -> Array:
        """uint8 (B, H, W, 3) -> (B, C, H, W) in [-1, 1] as the autoencoder takes them, on its device."""
        return self.array(to_values(luminance(pictures) if self.image_channels == 1 else pictures))

    def encode(self, pictures: np.ndarray) -> Array:
        """uint8 (B, H, W, 3) -> latents (B, C, h, w), the posterior's means, each picture by itself."""
        rows = [self.encode_images(self.as_images(picture[None])) for picture in pictures]
        return library(rows[0]).concatenate(rows)

    def encode_images(self, images: Array) -> Array:
        """Images (B, C, H, W) in [-1, 1] -> latents, float32."""
        return self._computed(lambda: self.autoencoder.latents_of(images), "encoded")

    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], float32."""
        return self._computed(lambda: self.autoencoder.images_of(latents), "decoded").clip(-1, 1)

    def _computed(self, compute: Callable[[], Array], what: str) -> Array:
        """By the autoencoder in its own precision; where that is too small for it, again in float32."""
        narrow = str(self.autoencoder.dtype).removeprefix("torch.")
        found = compute()
        if narrow == "float32" or _all_finite(found):
            return found
        with self.autoencoder.in_float32():
            found = compute()
        if _all_finite(found):
            self._notes.append(f"the autoencoder gave non-finite numbers in {narrow}; {what} in float32 instead")
        return found

    def _kept(self, images: Array, canvases: Sequence[Canvas | None]) -> Array:
        """Images (B, C, H, W) with the given pixels where nothing was to be drawn, without what was padded."""
        if all(canvas is None for canvas in canvases):
            return images
        rows = [i if c is None else c.kept(i, self.array) for i, c in zip(images, canvases, strict=True)]
        return library(images).stack(rows)

    def differentiable_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> images about in [-1, 1], float32, in the autoencoder's precision, for gradients."""
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype)).float()

    def size(self, asked: Request, canvas: Canvas | None = None) -> tuple[int, int]:
        """Height and width in pixels of the first pass; raises ConfigError for what the networks cannot draw."""
        lowest = min(*SIDES, *self.card.size)
        if canvas is not None:
            height, width = canvas.pixels.shape[:2]
            if min(height, width) < lowest:
                told = f"{canvas.size[1]}x{canvas.size[0]} pixels, less than {lowest}. Enlarge it (width, height)"
                raise ConfigError(f"{canvas.names[0] or 'the image'} is of {told}")
        else:
            height = self.card.size[0] if asked.height is None else asked.height
            width = self.card.size[1] if asked.width is None else asked.width
        size = check_size("height", height, self.multiple, lowest), check_size("width", width, self.multiple, lowest)
        if asked.hires_scale:
            for name, side in zip(("height", "width"), enlarged(size, asked, self.multiple), strict=True):
                check_size(f"{name} after hires_scale", side, self.multiple, lowest)
        return size

    def record(self, job: Job, own: bool = False, place: tuple[int, int] = (0, 1)) -> ImageMetadata:
        """What a picture says of itself; `place` is its place in its batch, and the batch's size."""
        canvas = job.canvas
        drawn = enlarged(self.size(job.request, canvas), job.request, self.multiple)
        height, width = drawn if canvas is None else canvas.size
        return ImageMetadata(
            request=job.request.model_dump(),
            index=job.index,
            seed=job.seed,
            width=width,
            height=height,
            steps=step_counts(job.request, canvas),
            model=self.card.name,
            model_hash=self.card.hash,
            model_source=self.card.source,
            variant=self.card.variant,
            sources=tuple(self.extras.sources.values()),
            canvas=None if canvas is None else canvas.record(),
            runtime=self.runtime,
            device=self.device.type if self.runtime == "torch" else "cpu",
            dtype=str(self.unet.dtype).removeprefix("torch."),
            speed=self.speed,
            versions=installed_versions(self.runtime),
            batch=place,
            own_noise=own or job.own is not None,
        )


def _all_finite(array: Array) -> bool:
    return bool(library(array).isfinite(array).all())


def _joined(outputs: list[Output]) -> Output:
    """Batches of pictures as one."""
    seeds = [seed for output in outputs for seed in output.seeds]
    records = [record for output in outputs for record in output.metadata]
    notes = list(dict.fromkeys(note for output in outputs for note in output.notes))
    return Output(_together([output.images for output in outputs]), seeds, records, notes)


def _together(batches: list[Any]) -> Any:
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise ConfigError("pictures of several sizes are no single array; ask for pil")
    return library(batches[0]).concatenate(batches)
