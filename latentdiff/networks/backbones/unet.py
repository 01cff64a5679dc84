"""The U-Net: diffusers.UNet2DConditionModel behind the protocols of `networks.protocols`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import FEATURE, RESIDUAL, Conditions, ImagePrompt, added, image_prompt
from latentdiff.networks.protocols import Spec
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced, example

TIME_CONDITION = "time_cond"  # an entry of the config: what joins the time, if not the guidance
TIME_CONDITIONS = ("guidance", "until")
WAVES = 256  # in which a U-Net reads its guidance, as the published distilled ones
GRAPH = "unet"  # its part, and the name of its graph
_FUSED = {"to_qkv", "to_kv"}


class UNet(nn.Module):
    """(x_t, t, conditions) -> output, with x_t (B, C, h, w), t a time or (B,) times, conditions `tokens` (B, L, D).

    Stable Diffusion XL's also reads `pooled` and `sizes`, and a distilled one `guidance`, by default 1, or
    `until`, by default t. Under K conditions x_t runs K times in one batch and the output is (K, B, C, h, w).
    """

    def __init__(self, model: UNet2DConditionModel):
        super().__init__()
        self.model, self._fused, self._turn = model, False, Turn()

    @classmethod
    def create(
        cls,
        *,
        sample_size: int,
        channels: int,
        context_dim: int,
        block_out_channels: tuple[int, ...],
        attention: tuple[bool, ...],
        layers_per_block: int,
        num_heads: int,
        norm_num_groups: int,
        pooled_text: bool,
        beside: int = 0,
        classes: int | None = None,
    ) -> UNet:
        """A new U-Net with random weights; `attention` says which levels attend to the text, from the finest.

        beside: channels that it reads beside x. classes: the number of values of `label`, if it reads that.

        With `pooled_text` the text, pooled by attention, joins the embedding of the time, and both scale and shift
        every residual block (as in GLIDE, Nichol et al. 2021).
        """
        model = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=channels + beside,
            num_class_embeds=classes,
            out_channels=channels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            cross_attention_dim=context_dim,
            attention_head_dim=num_heads,  # diffusers' name for the number of heads
            norm_num_groups=norm_num_groups,
            addition_embed_type="text" if pooled_text else None,
            addition_embed_type_num_heads=num_heads,
            resnet_time_scale_shift="scale_shift" if pooled_text else "default",
        )
        return cls(model)

    @property
    def spec(self) -> Spec:
        """See Spec. Latents may have any sides: each level is enlarged to the size of its skip connections."""
        config = self.model.config
        width = config.cross_attention_dim
        width = int(width if isinstance(width, int) else width[0])  # of every level
        reads: dict[str, tuple[int | None, ...]] = {"tokens": (None, width)}
        if config.addition_embed_type == "text_time":
            joined, each = int(config.projection_class_embeddings_input_dim), int(config.addition_time_embed_dim)
            sizes = 5 if joined - 5 * each == width else 6  # a refiner's tokens and pooled text are of one encoder
            reads |= {"pooled": (joined - sizes * each,), "sizes": (sizes,)}
        if config.num_class_embeds is not None and config.class_embed_type is None:
            reads["label"] = ()
        if config.time_cond_proj_dim is not None:
            reads[self._time_condition] = ()
        return Spec(int(config.in_channels), int(config.out_channels), reads=reads)

    @property
    def _time_condition(self) -> str:
        """The condition that joins the time: `guidance`, or `until`, of which diffusers knows nothing."""
        return str(self.model.config.get(TIME_CONDITION, "guidance"))

    def add_time_condition(self, name: str) -> None:
        """Add a layer that reads `guidance` or `until` as waves; zeros at first, so that no output changes."""
        layer = nn.Linear(WAVES, self.model.config.block_out_channels[0], bias=False)
        nn.init.zeros_(layer.weight)
        self.model.time_embedding.cond_proj = layer.to(self.model.device, self.dtype)
        self.model.register_to_config(
            time_cond_proj_dim=WAVES, **({TIME_CONDITION: name} if name != "guidance" else {})
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The network's output; see the class."""
        conditions, x, count = conditions.cast(self.dtype), x.to(self.dtype), conditions.count
        if not count:
            return self._output(x, t, conditions)
        time = t.expand(len(x)).repeat(count) if isinstance(t, Tensor) and t.ndim else t
        output = self._output(x.repeat(count, 1, 1, 1), time, conditions.flattened())
        return output.reshape(count, len(x), *output.shape[1:])

    @torch.no_grad()
    def prepared(self, conditions: Conditions) -> Conditions:
        """The conditions in the network's precision; after `fuse`, with the keys and values of the text."""
        conditions = conditions.cast(self.dtype)
        if not self._fused:
            return conditions
        rows = conditions["tokens"].flatten(0, -3)
        with self._turn:
            heads = {name: (each.to_k(rows), each.to_v(rows)) for name, each in self._attentions("attn2")}
        return replace(conditions, prepared=heads)

    def fuse(self) -> None:
        """Compute queries, keys and values in one product, and those of the text once a picture, in `prepared`.

        Self-attention with adapters beside its weights keeps its three products, which include the adapters.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        if not adapted:
            self.model.fuse_qkv_projections()
        for _, attention in self._attentions("attn1"):
            attention.set_processor(_Plain() if adapted else _Fused())
        for name, attention in self._attentions("attn2"):
            attention.set_processor(_CrossAttention(name))
        self._fused = True

    def unfuse(self) -> None:
        """Undo `fuse`."""
        if self._fused:
            self.model.unfuse_qkv_projections()
            self.model.set_attn_processor(AttnProcessor2_0())
            for module in self.model.modules():  # diffusers leaves the fused weights, which would be saved
                for name in _FUSED & module._modules.keys():
                    delattr(module, name)
                    module.fused_projections = False
        self._fused = False

    def cross_attentions(self) -> list[tuple[str, Any]]:
        """The layers that attend to the text, by name."""
        return self._attentions("attn2")

    def _attentions(self, kind: str) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if name.endswith(f".{kind}")]

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """See Backbone. Gradients are switched off here, since a mode set inside a generator leaks to its caller."""
        with self._turn:
            output: Tensor = self(x, t, conditions)
        return output.float()

    @torch.no_grad()
    def predict_from(self, x: Tensor, t: float, conditions: Conditions, deep: Tensor | None) -> tuple[Tensor, Tensor]:
        """`predict` and its deep features: what the levels below the finest hand to it.

        With the deep features of an earlier step only the finest level is computed (DeepCache, Ma et al. 2024,
        section 3.2).
        """
        with self._turn, self.deep(deep) as features:
            output = self.predict(x, t, conditions)
        return output, features[0]

    @contextmanager
    def deep(self, replacement: Tensor | None) -> Iterator[list[Tensor]]:
        """A block in which the outputs below the finest level are collected, or replaced by given ones."""
        downs, ups = list(self.model.down_blocks)[1:], list(self.model.up_blocks)[:-1]
        features: list[Tensor] = [] if replacement is None else [replacement]
        changed: dict[nn.Module, Any] = {}
        if replacement is None:
            changed[ups[-1]] = _collecting(ups[-1].forward, features)
        else:
            for block in downs:  # as many skip connections as computed blocks make: the blocks above consume them
                changed[block] = _passing(len(block.resnets) + (block.downsamplers is not None))
            changed |= dict.fromkeys([self.model.mid_block, *ups[:-1]], _passing(0))
            changed[ups[-1]] = lambda *_, **__: replacement
        own = {block: block.__dict__.get("forward") for block in changed}
        compiled, self.model._compiled_call_impl = self.model._compiled_call_impl, None  # it knows of no change
        try:
            for block, forward in changed.items():
                block.forward = forward
            yield features
        finally:
            self.model._compiled_call_impl = compiled
            for block, forward in own.items():
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    @property
    def deep_levels(self) -> int:
        """The number of levels below the finest."""
        return len(self.model.down_blocks) - 1

    def predict_perturbed(self, x: Tensor, t: float, conditions: Conditions) -> Tensor:
        """`predict` with the identity for the self-attention maps of the middle block (Ahn et al. 2024, eq. 13)."""
        with self._turn:
            processors = self.model.attn_processors
            self.model.set_attn_processor({**processors, **{name: _Identity() for name in self._perturbed()}})
            try:
                return self.predict(x, t, conditions)
            finally:
                self.model.set_attn_processor(processors)

    @property
    def perturbed_blocks(self) -> int:
        """The number of self-attentions in the middle block."""
        return len(self._perturbed())

    def _perturbed(self) -> list[str]:
        names = self.model.attn_processors
        return [name for name in names if name.startswith("mid_block") and ".attn1." in name]

    def _output(self, x: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        added = None
        if "sizes" in conditions.arrays:
            added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}
        label = conditions.get("label")
        text = None if conditions.prepared is None else {"text": conditions.prepared}
        time, residuals = torch.as_tensor(t, device=x.device), conditions.added(RESIDUAL)
        with self._with_image_prompts(conditions.image_prompts):
            output: Tensor = self.model(
                x,
                time,
                conditions["tokens"],
                class_labels=None if label is None else label.long(),
                timestep_cond=self._waves(x, time, conditions),
                added_cond_kwargs=added,
                cross_attention_kwargs=text,
                down_block_additional_residuals=tuple(residuals[:-1]) or None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
                down_intrablock_additional_residuals=conditions.added(FEATURE) or None,
                return_dict=False,
            )[0]
        return output

    def _waves(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor | None:
        """Sines and cosines (B, D) of 1000 (w - 1) with the scale w of guidance (Luo et al. 2023, section 4.1), or of
        the time from `until` to t (Geng et al. 2025).
        """
        width = self.model.config.time_cond_proj_dim
        if width is None:
            return None
        number = conditions.get(self._time_condition)
        if number is None:
            number = torch.zeros(len(x), device=x.device)
        else:
            number = 1000 * (number - 1) if self._time_condition == "guidance" else time - number
        return get_timestep_embedding(number, width, downscale_freq_shift=1).to(x.dtype)

    @contextmanager
    def _with_image_prompts(self, prompts: Sequence[ImagePrompt]) -> Iterator[None]:
        """A block in which cross-attention attends to image prompts too.

        With gradients it stays until the next block, because recomputed activations (`save_memory`) need it later.
        """
        if not prompts:
            yield
            return
        attentions = self._attentions("attn2")
        before = [attention.processor for _, attention in attentions]
        compiled, self.model._compiled_call_impl = self.model._compiled_call_impl, None  # it knows of no change
        for layer, (name, attention) in enumerate(attentions):
            attention.processor = _CrossAttention(name, [(each.heads[layer], each.mask) for each in prompts])
        try:
            yield
        finally:
            self.model._compiled_call_impl = compiled
            if not torch.is_grad_enabled():
                for (_, attention), processor in zip(attentions, before, strict=True):
                    attention.processor = processor

    def use_plain_attention(self) -> None:
        """Compute attention as two matrix products and a softmax, for training on a CPU.

        There the backward pass of torch's fused attention is the slowest part of a step on maps as small as ours.
        Without it a step takes a quarter to a third less time.
        """
        self.model.set_attn_processor(AttnProcessor())

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """A block without `use_plain_attention`: outputs equal those of a loaded network to the bit."""
        own = dict(self.model.attn_processors)
        self.model.set_attn_processor(AttnProcessor2_0())
        try:
            yield
        finally:
            self.model.set_attn_processor(own)

    def traced(self) -> dict[str, Traced]:
        """(x, time (1,), the conditions by name) -> output; with deep features as a further output, or as an input."""
        plain = self._examples()
        graphs = {GRAPH: Traced(GRAPH, self.model, self._function, plain)}
        if self.deep_levels:
            with torch.no_grad():
                shallow = [inputs | {"deep": self._deep(**inputs)[1]} for inputs in plain]
            graphs[f"{GRAPH}_deep"] = Traced(GRAPH, self.model, self._deep, plain)
            graphs[f"{GRAPH}_shallow"] = Traced(GRAPH, self.model, self._shallow, shallow)
        steered = [inputs | added([example(*shape) for shape in self._skips(inputs["x"])]) for inputs in plain]
        graphs[f"{GRAPH}_controlled"] = Traced(GRAPH, self.model, self._function, steered)
        prompts = [self._example_prompt(len(plain[0]["x"]), 4), self._example_prompt(len(plain[1]["x"]), 6)]
        for name, inputs in {"": plain, "_controlled": steered}.items():
            prompted = [own | prompt for own, prompt in zip(inputs, prompts, strict=True)]
            graphs[f"{GRAPH}_prompted{name}"] = Traced(GRAPH, self.model, self._function, prompted)
        return graphs

    def _example_prompt(self, rows: int, length: int) -> dict[str, Tensor]:
        """The keys and values of an image prompt of `length` tokens."""
        return image_prompt(0, [example(rows, 2, length, width) for _, width in self.prompted_layers])

    @property
    def prompted_layers(self) -> list[tuple[str, int]]:
        """See PromptedByPictures."""
        return [(name, int(attention.to_k.out_features)) for name, attention in self._attentions("attn2")]

    def _skips(self, x: Tensor) -> list[tuple[int, ...]]:
        """The shapes of the skip connections and of the middle's output, which controls add to."""
        config, (rows, _, height, width) = self.model.config, x.shape
        layers, widths = config.layers_per_block, list(config.block_out_channels)
        counts = [layers] * len(widths) if isinstance(layers, int) else list(layers)
        shapes = [(rows, widths[0], height, width)]
        for level, (channels, count) in enumerate(zip(widths, counts, strict=True)):
            shapes += [(rows, channels, height, width)] * count
            if level < len(widths) - 1:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((rows, channels, height, width))
        return [*shapes, shapes[-1]]

    def _function(self, x: Tensor, time: Tensor, **arrays: Tensor) -> Tensor:
        return self._output(x, time, Conditions(arrays))

    def _deep(self, x: Tensor, time: Tensor, **arrays: Tensor) -> tuple[Tensor, Tensor]:
        with self.deep(None) as features:
            output = self._function(x, time, **arrays)
        return output, features[0]

    def _shallow(self, x: Tensor, time: Tensor, deep: Tensor, **arrays: Tensor) -> Tensor:
        with self.deep(deep):
            return self._function(x, time, **arrays)

    def _examples(self) -> list[dict[str, Tensor]]:
        """The inputs of the graph."""
        side = 2**self.deep_levels  # odd sides: each level is enlarged to the size of its skip connections
        examples = []
        for rows, height, width, length in ((3, 2 * side + 1, 3 * side + 1, 77), (1, 3 * side, 2 * side, 154)):
            inputs = {"x": example(rows, self.spec.inputs, height, width), "time": torch.tensor([501.0])}
            for name, shape in self.spec.reads.items():
                inputs[name] = example(rows, *(length if axis is None else axis for axis in shape))
            if "label" in inputs:
                inputs["label"] = torch.arange(float(rows))
            if "sizes" in inputs:
                inputs["sizes"] = torch.arange(float(inputs["sizes"].numel())).view_as(inputs["sizes"]) * 64
            examples.append(inputs)
        return examples

    def facts(self) -> dict[str, Any]:
        """See Traceable. graphs: their names by the number of channels of x."""
        return self.spec.facts() | {
            "graphs": {str(self.spec.inputs): GRAPH},
            "token_step": 0,
            "packs": False,
            "deep_levels": self.deep_levels,
            "clock": [1.0, 0.0],
            "skips": [shape[1] for shape in self._skips(torch.empty(1, 1, 1, 1))],
            "attentions": self.prompted_layers,
        }

    def save_memory(self) -> None:
        """Recompute activations in the backward pass instead of storing them (Chen et al. 2016)."""
        self.model.enable_gradient_checkpointing()

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights."""
        save_network(self.model, directory)


def _collecting(forward: Callable[..., Tensor], features: list[Tensor]) -> Callable[..., Tensor]:
    """A block's forward that also appends its output to a list."""

    def collecting(*args: Any, **settings: Any) -> Tensor:
        output = forward(*args, **settings)
        features.append(output)
        return output

    return collecting


def _passing(skips: int) -> Callable[..., Any]:
    """A forward that computes nothing and passes on values that no computed block reads."""

    def passing(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, (hidden_states,) * skips) if skips else hidden_states

    return passing


class _Plain(AttnProcessor2_0):
    """Self-attention that ignores the keys and values of the text."""

    def __call__(self, *args: Any, text: object = None, **settings: Any) -> Any:
        return super().__call__(*args, **settings)


class _Fused(FusedAttnProcessor2_0):
    """Self-attention with one product for queries, keys and values."""

    def __call__(self, *args: Any, text: object = None, **settings: Any) -> Any:
        return super().__call__(*args, **settings)


class _CrossAttention:
    """Cross-attention to the text, by its own name, and to image prompts.

    images: of each prompt keys and values (B, 2, L, H d), and where it acts (B, height, width) or None.
    """

    def __init__(self, name: str, images: Sequence[tuple[Tensor, Tensor | None]] = ()):
        self._name, self._images = name, images

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *_: Any,
        text: dict[str, tuple[Tensor, Tensor]] | None = None,
        **__: Any,
    ) -> Tensor:
        if text is None:  # the conditions hold no keys and values of the text
            keys, values = attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
        else:
            keys, values = text[self._name]
        queries = attention.to_q(hidden_states)
        hidden = _attended(attention.heads, queries, keys, values)
        for heads, mask in self._images:
            seen = _attended(attention.heads, queries, heads[:, 0], heads[:, 1])
            if mask is not None:
                seen = seen * IPAdapterMaskProcessor.downsample(mask, *seen.shape).to(seen.dtype)
            hidden = hidden + seen
        output: Tensor = attention.to_out[0](hidden) / attention.rescale_output_factor
        return output


def _attended(count: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of several heads, which lie one after the other in the last axis (B, L, H d)."""
    q, k, v = (each.reshape(*each.shape[:2], count, -1).transpose(1, 2) for each in (queries, keys, values))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Identity:
    """Self-attention in which every position attends only to itself."""

    def __call__(self, attention: Attention, hidden_states: Tensor, *_: Any, text: object = None, **__: Any) -> Tensor:
        values = attention.to_out[0](attention.to_v(hidden_states))
        return values / attention.rescale_output_factor
