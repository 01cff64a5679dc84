"""Prompt to images in one object: the facade of the package, with diffusers' names and meanings.

pipe = LatentDiffusionPipeline.from_pretrained()
pipe("a red circle above a blue square", seed=7).images[0].save("scene.png")
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.arrays import Array
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.core.files import recorded
from latentdiff.core.turn import Turn
from latentdiff.diffusion.samplers import Step
from latentdiff.drawing import calls, inputs, pixels
from latentdiff.drawing.batch import Job
from latentdiff.drawing.draw import OUTPUT_TYPES, Drawing, Watch, batches_of, canvas_of, draw, jobs_of
from latentdiff.drawing.hints import Hint, hints_of
from latentdiff.drawing.image_prompts import ImagePrompt, image_prompts_of
from latentdiff.drawing.latents import from_diffusers
from latentdiff.drawing.output import Output, as_path
from latentdiff.drawing.painter import Painter, check, torch_only
from latentdiff.drawing.passes import passes_of
from latentdiff.drawing.plan import plan
from latentdiff.drawing.presets import PRESETS, settled_for
from latentdiff.drawing.prompts import Memory
from latentdiff.drawing.record import Source
from latentdiff.drawing.request import Request, request
from latentdiff.families.image_prompts import ENCODER
from latentdiff.model import Model, ModelCard, Runtime, Speed
from latentdiff.runtime.kinds import OPENVINO_ONLY

if TYPE_CHECKING:
    import torch

    from latentdiff.drawing.extras import Fit

    Load = Callable[[Painter], tuple[Painter, Fit]]

__all__ = ["LatentDiffusionPipeline", "ModelCard", "Output"]


class LatentDiffusionPipeline:
    """A model and everything loaded beside it; all other settings are arguments of the call.

    Several threads may draw with one pipeline. What changes it (`to`, `load_...`, `fuse_lora`, a call that scales
    attached adapters) must not run during another call. speed: see `runtime.speed`; it is applied when the first
    picture is drawn.
    """

    __slots__ = ("_loads", "_painter", "_speed", "_turn")

    def __init__(self, model: Model, *, speed: Speed = "exact"):
        self._painter, self._speed, self._turn = Painter(model), speed, Turn()
        self._loads: tuple[Load, ...] = ()  # what has changed the weights of compiled networks
        self._forget()

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
        quantize: str | None = None,
        **parts: Any,
    ) -> LatentDiffusionPipeline:
        """Load a model from a folder in diffusers' layout, a single .safetensors file or a hub id.

        Without a path this is the default model inside the package. A hub id is fetched once, at `revision`. runtime:
        see `latentdiff.runtime.choice`; speed: exact, fast or max, see `latentdiff.runtime.speed`. quantize: a kind of
        weights with fewer bits, int8, int4, fp8, q8_0 or q4_0, see `latentdiff.runtime.quantized`. torch uses CUDA if
        there is one, and float32 by default. parts: diffusers' scheduler, vae or controlnet; its other arguments
        are accepted where they change nothing (safety_checker=None). Raises ModelError, UnsafeError, ConfigError.
        """
        from latentdiff.runtime import choice

        own = calls.loading_options(parts)
        model, chosen = choice.load(
            path,
            runtime=runtime,
            device=device,
            dtype=torch_dtype,
            variant=variant,
            revision=revision,
            speed=speed,
            quantize=quantize,
        )
        pipe = cls(model, speed=chosen)
        for name, part in own.items():
            setattr(pipe, name, part)
        return pipe

    @classmethod
    def from_single_file(cls, path: str | Path, **settings: Any) -> LatentDiffusionPipeline:
        """Load a .safetensors file in the original layout of Stable Diffusion; see `from_pretrained`."""
        return cls.from_pretrained(path, **settings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that this class and diffusers' pipelines can load; compiled networks are kept for drawing.

        Raises ConfigError if adapters are attached, or if there are only compiled networks.
        """
        from latentdiff.drawing.extras import check_merged
        from latentdiff.families.loading import save_model

        check_merged(self._painter)
        changed = any(source.kind in ("merged", "few-steps", "vae") for source in self._painter.sources.values())
        if self.runtime != "torch":
            save_model(self._by_torch("saving"), as_path(directory), with_student=not changed)
            return
        with self._changing("saving"):  # undoes what is fused for speed; drawing does it again
            save_model(self.model, as_path(directory), with_student=not changed)

    # what it is made of

    @property
    def model(self) -> Model:
        """The model in its present state."""
        return self._painter.model

    @property
    def card(self) -> ModelCard:
        """The model's name, hash, size and recommended settings."""
        return self.model.card

    @property
    def painter(self) -> Painter:
        """The model with everything loaded beside it."""
        with self._turn:
            if self._speed != "exact" and self.model.runtime == "torch" and self.model.speed != self._speed:
                from latentdiff.runtime.speed import sped_up

                self._painter = replace(self._painter, model=sped_up(self.model, self._speed), memory=Memory())
            return self._painter

    @property
    def components(self) -> dict[str, Any]:
        """The libraries' own parts, by diffusers' names."""
        with self._in_torch("components"):
            return dict(self.model.parts)

    @property
    def runtime(self) -> Runtime:
        """The library that the networks compute with."""
        return self.model.runtime

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantized: adapters then stay beside them and cannot be fused."""
        from latentdiff.runtime.quantized import is_quantized

        return is_quantized(self.model)

    @property
    def device(self) -> torch.device:
        """The device that the networks compute on."""
        import torch

        return torch.device(self.model.place.device)

    @property
    def scheduler(self) -> Any:
        """A scheduler of diffusers with the model's noise schedule.

        Setting one chooses the sampler, the spacing and the prediction. Raises ConfigError if its noise schedule is not
        the model's.
        """
        from latentdiff.families.scheduler import as_diffusers

        return as_diffusers(self.model)

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        from latentdiff.families.scheduler import sampling_for

        prediction, sampling = sampling_for(self.model, scheduler)
        if sampling.notes:
            warnings.warn(f"{', '.join(sampling.notes)} of this scheduler is not supported", stacklevel=2)
        self._recommend(**sampling.settings)
        self._revise(prediction=prediction)

    @property
    def vae(self) -> Any:
        """The VAE's module, or one of diffusers' that is set in its place."""
        return self.components["vae"]

    @vae.setter
    def vae(self, vae: Any) -> None:
        from latentdiff.drawing import extras
        from latentdiff.families.weights import codec_of, weights_hash

        with self._changing("another VAE"):
            codec = codec_of(vae)
            if codec is None:
                raise ConfigError(f"vae must be an AutoencoderKL or AutoencoderTiny (got {type(vae).__name__})")
            source = Source("vae", "", weights_hash(vae))
            self._painter = extras.with_codec(self._painter, codec.to(self.device), source)

    @property
    def controlnet(self) -> Any:
        """The module of the ControlNet, a list of several, or None. Setting takes modules or paths."""
        modules = [control.model for control in self._painter.controls]
        return modules if len(modules) > 1 else modules[0] if modules else None

    @controlnet.setter
    def controlnet(self, controlnet: Any) -> None:
        from latentdiff.drawing import extras
        from latentdiff.families.controls import control_of
        from latentdiff.families.weights import weights_hash

        if controlnet is None:
            self.unload_controlnets()
            return
        modules, before = getattr(controlnet, "nets", controlnet), self._painter  # of diffusers' MultiControlNetModel
        with self._in_torch("a ControlNet"):
            self.unload_controlnets()
            try:
                for each in modules if isinstance(modules, Iterable) and not isinstance(modules, str) else [modules]:
                    if isinstance(each, str | Path):
                        self.load_controlnet(each)
                    else:
                        control, source = control_of(each, self.model), Source("controlnet", "", weights_hash(each))
                        self._painter = extras.with_control(self._painter, control, source)
            except BaseException:
                self._painter = replace(self._painter, controls=before.controls, sources=before.sources)
                raise

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError; for a part of diffusers' pipelines it names the replacement."""
        if isinstance(attribute := inspect.getattr_static(type(self), name, None), property):
            return attribute.__get__(self)  # the property itself raised AttributeError: raise that one
        place = f": use components[{name!r}]" if name in ("unet", "text_encoder", "text_encoder_2", "tokenizer") else ""
        raise AttributeError(f"{type(self).__name__} has no {name}{place}")

    # changes

    def _recommend(self, **settings: Any) -> None:
        """Change the default settings of calls."""
        self._revise(card=replace(self.card, defaults={**self.card.defaults, **settings}))

    def _revise(self, **facts: Any) -> None:
        """Change fields of the model, in both runtimes."""
        other = self.model.torch_form
        later = None if other is None else lambda: replace(other(), **facts)
        self._painter = replace(self._painter, model=replace(self.model, torch_form=later, **facts))

    def rename(self, name: str) -> None:
        """Change the model's name in picture records and messages."""
        self._revise(card=replace(self.card, name=name))

    def enable_vae_tiling(self) -> None:
        """Decode in tiles by default, for large pictures."""
        self._recommend(vae_tiling=True)

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self._recommend(vae_tiling=False)

    def enable_vae_slicing(self) -> None:
        """Decode picture by picture by default."""
        self._recommend(vae_slicing=True)

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self._recommend(vae_slicing=False)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Accepted for diffusers' code: a call shows no bar. Use `stream` for a bar of your own."""
        if not settings.get("disable"):
            warnings.warn("set_progress_bar_config has no effect: a call shows no progress bar", stacklevel=2)

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Accepted for diffusers' code, without effect."""
        warnings.warn("enable_attention_slicing has no effect: torch computes attention in parts anyway", stacklevel=2)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Accepted for diffusers' code, without effect."""
        warnings.warn(
            "enable_xformers_memory_efficient_attention has no effect: torch's attention is used", stacklevel=2
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LatentDiffusionPipeline:
        """Move the networks and everything loaded beside them; returns itself. Raises ConfigError.

        As in diffusers a dtype may be the first argument.
        """
        if type(device).__name__ == "dtype":
            device, dtype = None, device
        if self.runtime != "torch" and dtype is None and str(device) in ("cpu", "None"):
            return self
        from latentdiff.drawing import extras
        from latentdiff.runtime.device import moved

        with self._changing("moving"):
            painter = self._painter
            weaker = None if painter.weaker is None else moved(painter.weaker, device, dtype)
            refiner = None if painter.refiner is None else moved(painter.refiner, device, dtype)
            model = moved(painter.model, device, dtype)
            cascade = tuple(replace(each, model=moved(each.model, device, dtype)) for each in painter.cascade)
            controls = tuple(control.to(model.place.device, dtype) for control in painter.controls)
            painter = replace(painter, model=model, weaker=weaker, refiner=refiner, cascade=cascade, controls=controls)
            self._painter = extras.with_adapters_placed(painter)
            for network in (painter.scorer, painter.upscaler):
                if network is not None:
                    network.to(device=self.device)
            return self

    def offload(
        self, device: str | torch.device, *, layers: bool = False, blocks: bool = False
    ) -> LatentDiffusionPipeline:
        """Keep the networks in the CPU's memory and compute on `device`; returns itself.

        Each network moves there when it is needed; with `blocks` each of its repeated blocks, on CUDA while the one
        before computes; with `layers` each of its layers, which is slower and takes the least memory.
        """
        from latentdiff.runtime.offload import Unit, offloaded

        if layers and blocks:
            raise ConfigError("offload moves blocks or layers, not both")
        with self._changing("offloading"):
            unit: Unit = "layer" if layers else "block" if blocks else "network"
            self._painter = replace(self._painter, model=offloaded(self.model, device, unit))
            return self

    def enable_model_cpu_offload(self, device: str = "cuda") -> None:
        """See `offload`, under diffusers' name."""
        self.offload(device)

    def enable_sequential_cpu_offload(self, device: str = "cuda") -> None:
        """See `offload`, under diffusers' name."""
        self.offload(device, layers=True)

    def enable_group_offload(self, onload_device: str = "cuda", **settings: Any) -> None:
        """See `offload` by blocks, under diffusers' name. diffusers' other settings are ignored."""
        if settings:
            warnings.warn(f"enable_group_offload ignores {', '.join(settings)}", stacklevel=2)
        self.offload(onload_device, blocks=True)

    def load_lora_weights(
        self, path: str | Path, adapter_name: str | None = None, *, weight: float = 1.0, fuse: bool = False
    ) -> Fit:
        """Load an adapter beside the networks, or with `fuse` into their weights; returns how it fits.

        Its names are PEFT's, diffusers' or kohya's; LoHa and LoKr require `fuse`. Raises ModelError, ConfigError.
        """
        from latentdiff.drawing import extras

        load = partial(extras.with_adapter, path=as_path(path), name=adapter_name, weight=weight, merged=fuse)
        if fuse and self.model.torch_form is not None and (fit := self._fused(load)):
            return fit
        with self._changing("an adapter"):
            self._painter, fit = load(self._painter)
            return fit

    def _fused(self, load: Load) -> Fit | None:
        """Put the weights that an adapter changes into compiled networks.

        None for an adapter with words, which only torch's text encoders learn.
        """
        from latentdiff.runtime import merging

        before = self._painter
        by_torch, fit = load(replace(before, model=_exact(before, self._loads)))
        if fit.words:
            return None
        (source,) = (by_torch.sources[name] for name in by_torch.sources.keys() - before.sources.keys())
        tensors = merging.weights_of(by_torch.model, fit.layers, Path(source.path))
        made = _after(load, before, source)
        model = merging.with_weights(before.model, lambda: tensors, merging.hash_of(tensors), made)
        self._painter, self._loads = replace(by_torch, model=model), (*self._loads, load)
        self._forget()
        return fit

    def load_few_steps(self) -> None:
        """Change to the student of few steps in the model's folder, an adapter of consistency distillation.

        Calls then draw in 4 steps without guidance, unless they ask for others. Raises ConfigError, ModelError.
        """
        from latentdiff.drawing import extras

        before, file = self._painter, extras.few_steps_of(self.card)
        if "few-steps" in before.sources:
            return
        if self.model.quantized:
            raise ConfigError(
                f"a student of few steps requires weights that are not quantized ({self.model.quantized})"
            )
        load = partial(extras.with_few_steps, file=file)
        if before.model.torch_form is None:
            with self._changing("a student of few steps"):
                self._painter, _ = load(self._painter)
        elif any(source.kind == "merged" for source in before.sources.values()):
            self._fused(load)
        else:
            self._painter = self._later(load, extras.source_of_few_steps(file), file)
            self._loads = (load,)
            self._forget()
        self._recommend(**PRESETS["lcm"])

    def _later(self, load: Load, source: Source, file: Path) -> Painter:
        """The painter with compiled networks changed by a file, read only for graphs missing from the cache."""
        from latentdiff.runtime import merging

        before, made = self._painter, _after(load, self._painter, source)

        def tensors() -> Any:
            by_torch, fit = load(replace(before, model=_exact(before)))
            _check_same(by_torch.sources["few-steps"], source)
            return merging.weights_of(by_torch.model, fit.layers, file)

        model = merging.with_weights(before.model, tensors, source.sha256, made)
        return replace(before, model=model).with_source("few-steps", source)

    @property
    def has_few_steps(self) -> bool:
        """Whether the model's folder has a student of few steps, see `load_few_steps`."""
        from latentdiff.drawing import extras

        return extras.few_steps_at(self.card.folder) is not None

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Make these adapters active, with one weight for all or one each."""
        from latentdiff.drawing import extras

        with self._changing("an adapter"):
            self._painter = extras.weighed(self._painter, extras.names_and_weights(names, weights))

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the active adapters to the weights: drawing is as fast as without them. This cannot be undone."""
        from latentdiff.drawing import extras

        with self._changing("an adapter"):
            self._painter = extras.merged(self._painter, lora_scale)

    def unload_lora_weights(self) -> None:
        """Detach every adapter that is not fused."""
        from latentdiff.drawing import extras

        if any(source.kind == "lora" for source in self._painter.sources.values()):
            with self._changing("an adapter"):
                self._painter = extras.unloaded(self._painter)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Load learnt words for use in prompts; returns the words."""
        from latentdiff.drawing import extras

        with self._changing("a learnt word"):
            self._painter, words = extras.with_words(self._painter, as_path(path), token)
            return words

    def load_clip(self, directory: str | Path | None = None) -> None:
        """Load a CLIP for guidance: a folder in open_clip's format, or the model's own.

        Raises ConfigError, ModelError.
        """
        from latentdiff.drawing import extras
        from latentdiff.families import clip

        with self._in_torch("guidance by CLIP"):
            path = None if directory is None else as_path(directory)
            scorer, sha256 = clip.scorer_of(path, self.card.folder)
            source = Source("clip", "" if path is None else recorded(path), sha256)
            self._painter = extras.with_scorer(self._painter, scorer, source)

    def load_weaker(self, path: str | Path) -> None:
        """Load a weaker model for autoguidance: smaller, or trained for less time.

        Raises ModelError if its latents or its path differ.
        """
        from latentdiff.drawing import extras

        with self._in_torch("a weaker model"):
            self._painter = extras.with_weaker(self._painter, self._another(path))

    def load_refiner(self, path: str | Path) -> None:
        """Load a model that continues on the same latents after the share `refiner_switch` of the levels.

        Raises ModelError if its latents or its path differ.
        """
        from latentdiff.drawing import extras

        with self._in_torch("a refiner"):
            self._painter = extras.with_refiner(self._painter, self._another(path))

    def load_cascade(self, path: str | Path) -> None:
        """Load a model that enlarges each picture; each call adds one, which enlarges the result of the one before.

        It draws with the prompt and the seed of the picture, and with the settings that it recommends. Raises
        ConfigError for a model that does not enlarge.
        """
        from latentdiff.drawing import extras
        from latentdiff.runtime import choice

        if self.runtime == "openvino":
            model, _ = choice.load(as_path(path))
        else:
            model, _ = choice.load(as_path(path), runtime="torch", device=self.device, dtype=self.model.dtype)
        self._painter = extras.with_cascade(self._painter, model)

    def load_upscaler(self, path: str | Path) -> None:
        """Load a network that enlarges in one evaluation (ESRGAN, SwinIR, ...), a .safetensors file.

        It enlarges finished pictures, or with `hires_scale` the input of the second pass. Raises ConfigError,
        ModelError.
        """
        from latentdiff.drawing import extras
        from latentdiff.families.spandrel_file import load_upscaler

        file = as_path(path)
        self._painter = extras.with_upscaler(self._painter, load_upscaler(file).to(self.device), file)

    def load_controlnet(self, path: str | Path) -> None:
        """Load a ControlNet; each call adds one, and each reads a picture of its own (`control_image`).

        path: a folder in diffusers' layout. Raises ModelError if it does not fit the U-Net.
        """
        from latentdiff.drawing import extras
        from latentdiff.families.controls import check_control, load_control

        place = as_path(path)
        if self.runtime == "openvino" and place.is_dir():
            from latentdiff.runtime.openvino import compiled_control

            folder = check_control(place)
            compiled: Any = compiled_control(folder, self.model.backbone, partial(load_control, place))
            if compiled is not None:
                self._painter = extras.with_control(self._painter, compiled, extras.source_of_control(place))
                return
        with self._in_torch("a ControlNet without graphs"):
            control, source = load_control(place, self.model), extras.source_of_control(place)
            self._painter = extras.with_control(self._painter, control, source)

    def unload_controlnets(self) -> None:
        """Remove all ControlNets."""
        from latentdiff.drawing import extras

        self._painter = extras.without_controls(self._painter)

    def load_ip_adapter(
        self,
        path: str | Path | Sequence[str | Path],
        subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] | None = None,
        *,
        image_encoder_folder: str | Path | None = ENCODER,
    ) -> None:
        """Load an IP-Adapter, or several, as in diffusers; each shows pictures of its own (`ip_adapter_image`).

        path: a .safetensors file, or a folder in which subfolder and weight_name lead to one. image_encoder_folder: a
        name beside that file, a path with a slash in the folder, or None if calls pass features.
        Raises ModelError, UnsafeError, ConfigError.
        """
        from latentdiff.drawing import extras
        from latentdiff.families import image_prompts

        weights, before = list(calls.each_weight(path, subfolder, weight_name)), len(self._painter.ip_adapters)
        has_graphs = self.runtime == "torch" or extras.reads_image_prompts(self.model)
        what = "a second IP-Adapter" if has_graphs else "an IP-Adapter without graphs of the U-Net for it"
        with nullcontext() if has_graphs and len(weights) + before == 1 else self._in_torch(what):
            painter = self._painter  # with all adapters, or unchanged
            for root, under, name in weights:
                file = image_prompts.place_of(as_path(root), under, name)
                folder = image_encoder_folder
                encoder = None if folder is None else image_prompts.encoder_of(file, as_path(root), folder)
                adapter = image_prompts.load_ip_adapter(file, encoder, self.model)
                painter = extras.with_ip_adapter(painter, adapter, extras.source_of_ip_adapter(file, encoder))
            self._painter = painter

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set the default `ip_adapter_scale` of calls: a number, a dict by block, or a list of them."""
        self._recommend(ip_adapter_scale=tuple(scale) if isinstance(scale, list | tuple) else (scale,))

    def unload_ip_adapter(self) -> None:
        """Remove all IP-Adapters."""
        from latentdiff.drawing import extras

        self._painter = extras.without_ip_adapters(self._painter)
        defaults = {name: value for name, value in self.card.defaults.items() if name != "ip_adapter_scale"}
        self._revise(card=replace(self.card, defaults=defaults))

    def _another(self, path: str | Path) -> Model:
        """Another model on this one's device, in its precision."""
        from latentdiff.families.loading import stored_model
        from latentdiff.runtime.device import moved

        backbone: Any = self.model.backbone
        return moved(stored_model(as_path(path)), self.device, backbone.dtype)

    def load_vae(self, path: str | Path, *, as_stored: bool = False) -> None:
        """Load another VAE for the same latents, from its folder, a model folder or a .safetensors file.

        It gets the precision of the previous one, or with `as_stored` keeps its own. Raises ModelError, UnsafeError.
        """
        from latentdiff.drawing import extras
        from latentdiff.families import check_vae
        from latentdiff.families.weights import load_vae

        with self._changing("another VAE"):
            place = as_path(path)
            own: Any = self.model.codec
            if place.is_file():
                from latentdiff.families.single_file import load_vae_file

                codec: Any = load_vae_file(place, own.scale)
                source = extras.source_of_vae(place)
            else:
                folder = check_vae(place)
                codec, source = load_vae(folder), extras.source_of_vae(place, folder)
            codec = codec.to(self.device, None if as_stored else own.dtype)
            self._painter = extras.with_codec(self._painter, codec, source)

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """A block that changes the networks: torch's modules, without speed-ups and cached prompts.

        If it fails, compiled networks are restored.
        """
        with self._in_torch(what):
            if self.model.speed != "exact":
                from latentdiff.runtime.speed import slowed_down

                self._painter = replace(self._painter, model=slowed_down(self.model))
            self._forget()
            yield

    def _forget(self) -> None:
        """Clear cached prompts. New ones are cached unless the encoder is a torch module, which users may train."""
        cached = self.model.runtime != "torch"
        self._painter = replace(self._painter, memory=Memory() if cached else None)

    @contextmanager
    def _in_torch(self, what: str) -> Iterator[None]:
        """Replace compiled networks by torch's, with a warning; restore them if the block fails.

        Raises ConfigError if OpenVINO was requested by name.
        """
        from latentdiff.drawing.extras import with_adapters_placed

        before = self._painter
        if self.runtime == "torch":
            yield
            return
        if self.model.torch_form is not None and self.model.runtime_is_fixed:
            raise ConfigError(f"{what} requires the torch runtime; {self.runtime} was requested by name")
        try:
            model = self._by_torch(what)
            controls = tuple(control.by_torch(model) for control in before.controls)
            self._painter = replace(before, model=model, memory=None, controls=controls)
            yield
            self._painter = with_adapters_placed(self._painter)
        except BaseException:
            self._painter = before
            raise
        warnings.warn(f"{what} requires torch: drawing with torch instead", stacklevel=4)

    def _by_torch(self, what: str) -> Model:
        """The model by torch, if its networks are compiled. Raises ConfigError."""
        if self.model.torch_form is None:
            lacks = f", which has no {self.model.quantized}" if self.model.quantized in OPENVINO_ONLY else ""
            raise ConfigError(f"{what} requires the torch runtime{lacks or f'; {self.runtime} was requested by name'}")
        return self.model.torch_form()

    def use_torch(self, what: str) -> None:
        """Switch to torch's networks unless they are in use; a warning names what requires them. Raises ConfigError."""
        with self._in_torch(what):
            pass

    # drawing

    def request(self, prompt: str, **settings: Any) -> Request:
        """A validated request with recommended settings; loads the model's own CLIP if the request requires it."""
        made = request(prompt=prompt, **settled_for(self.model, settings))
        what = torch_only(made, self.model, len(self._painter.ip_adapters))
        with self._in_torch(what) if what else nullcontext():
            if made.clip_guidance_scale and self._painter.scorer is None:
                self.load_clip()
            check(made, self._painter)
        return made

    def begin(self, request: Request, pictures: int = 1) -> None:
        """Start to compile networks for a request's first batch while its prompts are read."""
        if self.model.ready is not None:
            latents = self.model.codec.shape(plan(request, self.model).size)
            rows = min(pictures, request.batch_size)
            conditions = 2 if request.cfg(self.model.reads_guidance) > 1 else 1
            self.model.ready((rows, *latents), conditions, request.cache_interval > 1)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        outpaint: Sequence[int] | None = None,
        control_image: Any = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Any = None,
        generator: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        **settings: Any,
    ) -> Any:
        """Draw `num_images_per_prompt` pictures of each prompt; picture i of the call has seed `seed + i`.

        prompt: one or several; the empty prompt is unconditional.
        image: a PIL image, uint8 (H, W, 3) or floats in [0, 1] to start from. mask_image: of its size; white is
        redrawn, black is returned unchanged, grey is mixed. outpaint: pixels to add on the (left, top, right, bottom).
        control_image: the picture of the ControlNet, or a list with one for each.
        ip_adapter_image: the picture of the IP-Adapter, or for each a picture or a list of pictures.
        ip_adapter_image_embeds: features instead, (2, N, ...) for each adapter, those of no picture first.
        settings: guidance_scale, sampler, strength, seed and others of `Request`; from diffusers also class_labels,
        timesteps, sigmas, callback_on_step_end, return_dict, and of cross_attention_kwargs scale and ip_adapter_masks.
        latents: initial noise (N, C, h, w), or tokens where diffusers' pipeline takes them. generator: one
        torch.Generator or N. Both replace the keyed noise.
        prompt_embeds: token embeddings (B, L, D) instead of B prompts, and the other embeds as in diffusers.
        output_type: "pil"; "np", float32 (N, H, W, 3) in [0, 1]; "pt", (N, 3, H, W) in [0, 1]; "latent"; "uint8",
        (N, H, W, 3).

        Returns an Output, or with return_dict=False diffusers' tuple. Raises ConfigError, NonFiniteError.
        """
        sizes = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
        call = calls.translated({**{name: side for name, side in sizes.items() if side is not None}, **settings})
        settings = call.settings
        prompt = calls.classes(settings, prompt, self.model)
        calls.second_prompts(settings, prompt, negative_prompt)
        embeds = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        self._check_call(output_type, settings, prompt, negative_prompt, embeds)
        tokens = self.model.backbone.spec.reads.get("tokens", (None, None))[-1] or 0
        own = inputs.embeds_of(*embeds, width=tokens, with_pooled=self.model.reads_sizes)
        prompts = ["(embeddings)"] * len(own) if own else inputs.prompts_of(prompt)
        fields = {**settings, "num_images": num_images_per_prompt}
        fields |= calls.batch_of_one_generator(settings, generator, len(prompts), num_images_per_prompt)
        margins = inputs.margins_of(outpaint)
        image, mask_image = calls.picture(image), calls.mask(mask_image)
        hints, image_prompts = self._pictures_beside(
            control_image, ip_adapter_image, call.masks, ip_adapter_image_embeds
        )
        if self.runtime != "torch" and any(each.masks for each in image_prompts):
            self.use_torch("a mask of an image prompt")
        jobs: list[Job] = []
        negatives = calls.negatives(negative_prompt, len(prompts))
        for index, one in enumerate(prompts):
            made = self.request(one, negative_prompt=negatives[index], **fields)
            canvas = jobs[0].canvas if jobs else canvas_of(self.model, made, image, mask_image, margins=margins)
            jobs += jobs_of(self.model, made, canvas, own[index] if own else None, hints, image_prompts)
            fields["seed"] = made.seed + made.num_images  # the next prompt continues the count
        shape = (len(jobs), *self.model.codec.shape(jobs[0].plan.size))
        noise = inputs.noise_of(from_diffusers(self.model, latents, shape), generator, shape, self.model.array)
        with self._adapters_scaled(call.adapters):
            out = draw(self.painter, jobs, output_type, noise, self._watch(call, jobs))
        if not call.as_tuple:
            return out
        return (out.images,) if self.model.reads_sizes else (out.images, None)

    def _pictures_beside(
        self, control_image: Any, ip_adapter_image: Any, masks: Any = None, embeds: Any = None
    ) -> tuple[tuple[Hint, ...], tuple[ImagePrompt, ...]]:
        """The pictures that ControlNets and IP-Adapters read. Raises ConfigError unless there is one for each."""
        hints = hints_of(calls.pictures(control_image), len(self._painter.controls))
        number = len(self._painter.ip_adapters)
        return hints, image_prompts_of(calls.pictures(ip_adapter_image), masks, number, embeds=embeds)

    @contextmanager
    def _adapters_scaled(self, scale: float) -> Iterator[None]:
        """A block in which every attached adapter has `scale` times its weight."""
        from latentdiff.drawing import extras

        before = {
            name.removeprefix("adapter "): source.weight
            for name, source in self._painter.sources.items()
            if source.kind == "lora" and source.weight is not None
        }
        if scale == 1 or not before:
            yield
            return
        memory = self.painter.memory  # its prompts were encoded with the full weights
        scaled = {name: scale * weight for name, weight in before.items()}
        self._painter = replace(extras.weighed(self._painter, scaled), memory=None)
        try:
            yield
        finally:
            self._painter = replace(extras.weighed(self._painter, before), memory=memory)

    def _watch(self, call: calls.Call, jobs: Sequence[Job]) -> Watch | None:
        if call.callback is None:
            return None
        painter = self.painter
        if painter.cascade:
            raise ConfigError("callback_on_step_end is not supported in a cascade, whose models have different latents")
        passes = passes_of(next(batches_of(painter, jobs)), painter, [])
        starts = [level.t for each in passes for level in each.levels()[:-1]]
        return calls.watching(call, self, jobs[0].request.sampler, starts)

    def _check_call(
        self, output_type: str, settings: dict[str, Any], prompt: Any, negative: Any, embeds: tuple[Any, ...]
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(f"unknown output_type {output_type!r}; one of {', '.join(OUTPUT_TYPES)}")
        if "num_images" in settings:
            raise ConfigError("use num_images_per_prompt instead of num_images")
        for name, text, embedding in (("prompt", prompt, embeds[0]), ("negative_prompt", negative, embeds[1])):
            if text is not None and embedding is not None:
                raise ConfigError(f"{name}_embeds replace the {name}: give only one of them")

    def stream(
        self,
        prompt: str,
        *,
        image: Any = None,
        mask_image: Any = None,
        outpaint: Any = None,
        control_image: Any = None,
        ip_adapter_image: Any = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Every sampling step of one prompt's first batch: `step.x`, `step.x0` are latents; `decode` shows them.

        Pictures and settings: see `__call__`. Raises ConfigError.
        """
        made = self.request(prompt, **settings)
        image, mask_image = calls.picture(image), calls.mask(mask_image)
        canvas = canvas_of(self.model, made, image, mask_image, margins=inputs.margins_of(outpaint))
        beside = self._pictures_beside(control_image, ip_adapter_image)
        painter = self.painter
        yield from Drawing(painter, next(batches_of(painter, jobs_of(painter.model, made, canvas, None, *beside))))

    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], float32."""
        return pixels.decode(self.model, latents)

    def encode(self, pictures: np.ndarray) -> Array:
        """uint8 (B, H, W, 3) -> latents (B, C, h, w), each picture by itself."""
        return pixels.encode(self.model, pictures)


def _exact(painter: Painter, loads: Iterable[Load] = ()) -> Model:
    """The painter's model in torch and float32, with `loads` applied.

    Adapters are always added in float32, so that pictures do not depend on the drawing precision.
    """
    import torch

    from latentdiff.families.loading import stored_model
    from latentdiff.runtime.device import moved

    card = painter.model.card
    changed = Painter(moved(stored_model(card.folder, card.variant), "cpu", torch.float32))
    for load in loads:
        changed, _ = load(changed)
    for name, source in changed.sources.items():
        _check_same(source, painter.sources[name])
    return changed.model


def _after(load: Load, before: Painter, source: Source) -> Callable[[], Model]:
    """A function that builds the torch model after `load`, for when torch replaces the compiled networks.

    source: the file, which is read again.
    """
    other = before.model.torch_form
    assert other is not None

    def made() -> Model:
        after, _ = load(replace(before, model=other()))
        (again,) = (after.sources[name] for name in after.sources.keys() - before.sources.keys())
        _check_same(again, source)
        return after.model

    return made


def _check_same(again: Source, source: Source) -> None:
    """Raises ModelError if a file has changed since it was loaded."""
    if again.sha256 != source.sha256:
        raise ModelError(f"{source.path or source.kind} was changed after it was loaded. Load it again")
