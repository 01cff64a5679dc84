"""Prompt to images: text encoder, guided sampling, autoencoder, in one object.

pipe = LatentDiffusionPipeline.from_pretrained()
pipe("a red circle above a blue square", seed=7).images[0].save("scene.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentdiff.diffusion import guidance, noise
from latentdiff.diffusion.denoiser import Denoiser, denoiser
from latentdiff.diffusion.samplers import SAMPLERS, Step
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ConfigError, NonFiniteError
from latentdiff.images import to_images, to_uint8
from latentdiff.metadata import ImageMetadata, installed_versions
from latentdiff.request import SIDES, Request, check_size, request

if TYPE_CHECKING:
    import torch

    from latentdiff.models.autoencoder import Autoencoder, IdentityAutoencoder
    from latentdiff.models.text_encoder import TextEncoder
    from latentdiff.models.unet import UNet

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Output:
    """The pictures of one call, in the order of their seeds, and a record of each."""

    images: Any
    seeds: list[int]
    metadata: list[ImageMetadata]


@dataclass(frozen=True)
class ModelCard:
    """What a model folder says beside its weights: name, hash, size in pixels and recommended settings."""

    name: str = "model"
    hash: str = ""
    size: tuple[int, int] = (64, 64)
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One picture of a request."""

    request: Request
    index: int

    @property
    def seed(self) -> int:
        """The picture's own seed."""
        return self.request.seed + self.index


class LatentDiffusionPipeline:
    """Networks, a noise schedule and what the network predicts; everything else is an argument of the call."""

    def __init__(
        self,
        autoencoder: Autoencoder | IdentityAutoencoder,
        text_encoder: TextEncoder,
        unet: UNet,
        schedule: NoiseSchedule,
        prediction: str,
        card: ModelCard,
    ):
        self.autoencoder, self.text_encoder, self.unet = autoencoder, text_encoder, unet
        self.schedule, self.prediction, self.card = schedule, prediction, card

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, device: str | None = None, torch_dtype: torch.dtype | None = None
    ) -> LatentDiffusionPipeline:
        """The model of a folder in diffusers' layout; without a path, the default model inside the package.

        On CUDA where there is one, float32 unless told otherwise. Raises ModelError, UnsafeError.
        """
        from latentdiff.pretrained import load_pipeline

        return load_pipeline(path, device=device, dtype=torch_dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that this class and diffusers.StableDiffusionPipeline load."""
        from latentdiff.pretrained import save_pipeline

        save_pipeline(self, Path(directory))

    @property
    def components(self) -> dict[str, Any]:
        """The parts, by diffusers' names."""
        return {
            "vae": self.autoencoder,
            "text_encoder": self.text_encoder,
            "tokenizer": self.text_encoder.tokenizer,
            "unet": self.unet,
        }

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusionPipeline:
        """Move the networks; returns itself."""
        for network in (self.autoencoder, self.text_encoder, self.unet):
            network.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    @property
    def image_channels(self) -> int:
        """3 for colour, 1 for grey."""
        return self.autoencoder.image_channels

    def request(self, prompt: str, **settings: Any) -> Request:
        """A validated request with the model's recommended settings where none are given."""
        asked = request(prompt=prompt, **{**self.card.defaults, **settings})
        if asked.num_inference_steps > self.schedule.T:
            raise ConfigError(f"num_inference_steps: the model has {self.schedule.T} (got {asked.num_inference_steps})")
        return asked

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Any = None,
        **settings: Any,
    ) -> Output:
        """Draw `num_images_per_prompt` pictures of each prompt; picture i of the call has seed `seed + i`.

        settings: height, width, num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, sampler,
        spacing, eta, seed, batch_size (see `Request`). latents: initial noise (N, C, h, w) instead of the keyed one.
        output_type: "pil", "np" (uint8 (N, H, W, 3)), "pt" ((N, 3, H, W) in [-1, 1]) or "latent".
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"unknown output_type {output_type!r}; one of {', '.join(OUTPUT_TYPES)}")
        if "num_images" in settings:
            raise ConfigError("num_images is num_images_per_prompt here")
        prompts = _prompts(prompt)
        fields = {**settings, "num_images": num_images_per_prompt, "negative_prompt": negative_prompt or ""}
        jobs: list[Job] = []
        for one in prompts:
            asked = self.request(one, **fields)
            jobs += jobs_of(asked)
            fields["seed"] = asked.seed + num_images_per_prompt  # the next prompt goes on counting
        if latents is not None:
            latents = self._own_latents(latents, jobs)
        batches = list(self.batches(jobs, output_type, latents))
        return Output(
            _joined([batch.images for batch in batches]),
            [seed for batch in batches for seed in batch.seeds],
            [record for batch in batches for record in batch.metadata],
        )

    def batches(self, jobs: Sequence[Job], output_type: str = "pil", latents: Any = None) -> Iterator[Output]:
        """The pictures of jobs that differ in prompt and seed only, a batch at a time."""
        size = jobs[0].request.batch_size
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            own = None if latents is None else latents[first : first + size]
            for step in self.steps(batch, own):
                final = step.x
            yield self.finish(batch, final, output_type, own_latents=own is not None)

    def stream(self, prompt: str, **settings: Any) -> Iterator[Step]:
        """Every sampling step of one prompt's first batch: `step.x`, `step.x0` are latents; `decode` shows them."""
        asked = self.request(prompt, **settings)
        yield from self.steps(jobs_of(asked)[: asked.batch_size])

    def steps(self, jobs: Sequence[Job], latents: Any = None) -> Iterator[Step]:
        """Sample jobs that differ in prompt and seed only, together, yielding each step.

        The initial noise of a picture is keyed by its seed, that of a step by (seed, step): neither depends on what
        else is in the batch, or on the device.
        """
        import torch

        asked = jobs[0].request
        shape = self._latent_shape(asked)

        def drawn(purpose: str, number: int = 0) -> torch.Tensor:
            stack = np.stack([noise.normal(shape, job.seed, purpose, step=number) for job in jobs])
            return torch.from_numpy(stack).to(self.device)

        levels = self.schedule.levels(asked.num_inference_steps, asked.spacing)
        x = drawn("initial latents") if latents is None else latents
        yield from _sampler(asked)(self._denoiser(jobs), x.float(), levels, partial(drawn, "sampling noise"))

    def _latent_shape(self, asked: Request) -> tuple[int, int, int]:
        height, width = self.size(asked)
        return self.autoencoder.latent_channels, height // self.autoencoder.factor, width // self.autoencoder.factor

    def _own_latents(self, latents: Any, jobs: Sequence[Job]) -> torch.Tensor:
        """The caller's initial noise on the device, one for each picture. Raises ConfigError."""
        import torch

        shape = (len(jobs), *self._latent_shape(jobs[0].request))
        try:
            own = torch.as_tensor(latents, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"latents must be a tensor of shape {shape} (got {type(latents).__name__})") from None
        if tuple(own.shape) != shape:
            raise ConfigError(f"latents must be of shape {shape} (got {tuple(own.shape)})")
        return own

    def finish(
        self, jobs: Sequence[Job], latents: torch.Tensor, output_type: str = "pil", *, own_latents: bool = False
    ) -> Output:
        """Decode final latents and record how each picture was made. Raises NonFiniteError."""
        import torch

        seeds = [job.seed for job in jobs]
        images: Any = latents if output_type == "latent" else self.decode(latents)
        if not (torch.isfinite(latents).all() and torch.isfinite(images).all()):
            what = "sampling" if not torch.isfinite(latents).all() else "decoding"
            raise NonFiniteError(f"{what} gave non-finite numbers (seeds {seeds}). Try float32 or less guidance")
        if output_type in ("pil", "np"):
            images = to_uint8(images)
        if output_type == "pil":
            images = [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in images]
        return Output(images, seeds, [self._record(job, own_latents) for job in jobs])

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) encoded to the posterior's mean and decoded again."""
        import torch

        with torch.no_grad():
            dtype = next(self.unet.parameters()).dtype
            mean, _ = self.autoencoder.encode(to_images(pictures).to(self.device, dtype))
            return to_uint8(self.decode(mean))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], float32."""
        import torch

        with torch.no_grad():
            dtype = next(self.unet.parameters()).dtype
            return self.autoencoder.decode(latents.to(dtype)).float().clamp(-1, 1)

    def _denoiser(self, jobs: Sequence[Job]) -> Denoiser:
        """The network under each job's prompt, guided as asked."""
        import torch

        asked = jobs[0].request
        cond = self._context([job.request.prompt for job in jobs])
        plain = self._conditioned(cond)
        if asked.guidance_scale <= 1:
            return plain
        uncond = self._context([job.request.negative_prompt for job in jobs])
        pair = self._conditioned(torch.stack([uncond, cond]))
        guided = (
            guidance.rescaled(pair, asked.guidance_scale, asked.guidance_rescale)
            if asked.guidance_rescale > 0
            else guidance.classifier_free(pair, asked.guidance_scale)
        )
        return guidance.within(guided, plain, *asked.guidance_interval) if asked.guidance_interval else guided

    def _context(self, prompts: list[str]) -> torch.Tensor:
        """Contexts (B, L, D); equal prompts are encoded once and by themselves, so that none sees the batch's size."""
        import torch

        known = {prompt: self.text_encoder.encode([prompt])[0] for prompt in dict.fromkeys(prompts)}
        return torch.stack([known[prompt] for prompt in prompts])

    def _conditioned(self, context: torch.Tensor) -> Denoiser:
        """Sampling is float32 whatever the network's own precision.

        Gradients are off around the network alone: a mode entered in a generator would leak to whoever iterates.
        """
        import torch

        dtype = next(self.unet.parameters()).dtype

        def network(x: torch.Tensor, t: float, context: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.unet(x.to(dtype), t, context).float()

        return denoiser(network, self.prediction, context)

    def size(self, asked: Request) -> tuple[int, int]:
        """Height and width in pixels of a request; raises ConfigError for what the networks cannot draw."""
        multiple = self.autoencoder.factor * self.unet.factor
        height = self.card.size[0] if asked.height is None else asked.height
        width = self.card.size[1] if asked.width is None else asked.width
        lowest = min(*SIDES, *self.card.size)
        return check_size("height", height, multiple, lowest), check_size("width", width, multiple, lowest)

    def _record(self, job: Job, own_latents: bool) -> ImageMetadata:
        height, width = self.size(job.request)
        return ImageMetadata(
            request=job.request.model_dump(),
            index=job.index,
            seed=job.seed,
            width=width,
            height=height,
            model=self.card.name,
            model_hash=self.card.hash,
            runtime="torch",
            device=self.device.type,
            dtype=str(next(self.unet.parameters()).dtype).removeprefix("torch."),
            versions=installed_versions(),
            own_latents=own_latents,
        )


def jobs_of(asked: Request) -> list[Job]:
    """A request's pictures, one by one."""
    return [Job(asked, index) for index in range(asked.num_images)]


def _sampler(asked: Request) -> Any:
    """The sampler by name, with eta where it is asked for."""
    sampler: Any = SAMPLERS[asked.sampler]
    return sampler if asked.eta is None else partial(sampler, eta=asked.eta)


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list. Raises ConfigError for none, or for what is not text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise ConfigError(f"prompt must be text or a list of texts (got {str(prompt)[:40]!r})")
    return prompts


def _joined(batches: list[Any]) -> Any:
    """Batches of pictures as one."""
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    if isinstance(batches[0], np.ndarray):
        return np.concatenate(batches)
    import torch

    return torch.cat(batches)
