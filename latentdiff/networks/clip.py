"""CLIP (Radford et al. 2021): open_clip's two towers for contrastive training, its text tower for conditioning."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from latentdiff.core.errors import ModelError
from latentdiff.core.files import let_others_read

VOCABULARY = 49408  # of CLIP
BYTES = 514  # words of a vocabulary without merges: bytes, bytes that end a word, start and end
_EMBEDDING = "token_embedding.weight"


class Clip(nn.Module):
    """Image and text towers into one space."""

    def __init__(self, embed_dim: int, vision: CLIPVisionCfg, text: CLIPTextCfg, *, quick_gelu: bool = False):
        super().__init__()
        self.config: dict[str, Any] = {"embed_dim": embed_dim, "vision_cfg": asdict(vision), "text_cfg": asdict(text)}
        self.config |= {"quick_gelu": True} if quick_gelu else {}
        self.towers = CLIP(embed_dim, vision, text, quick_gelu=quick_gelu)

    @classmethod
    def create(
        cls,
        *,
        image_size: int,
        embed_dim: int,
        text_width: int,
        text_layers: int,
        text_heads: int,
        max_length: int,
        patch_size: int,
        vision_width: int,
        vision_layers: int,
        vision_head_width: int,
        vocabulary: int = VOCABULARY,
    ) -> Clip:
        """New towers with random weights: a ViT for images (B, 3, S, S), a causal transformer for tokens."""
        vision = CLIPVisionCfg(
            layers=vision_layers,
            width=vision_width,
            head_width=vision_head_width,
            patch_size=patch_size,
            image_size=image_size,
        )
        text = CLIPTextCfg(
            context_length=max_length, vocab_size=vocabulary, width=text_width, heads=text_heads, layers=text_layers
        )
        clip = cls(embed_dim, vision, text)
        clip._spread_embeddings()
        return clip

    def _spread_embeddings(self) -> None:
        """Initialise the embeddings of words and positions again, as large as what the layers after them add.

        open_clip's deviation of 0.02 suits hundreds of millions of pairs. In a short training the layers drown such
        embeddings: "left" and "right" stay nearly the same context, and positions are not learnt at all.
        """
        nn.init.normal_(self.towers.token_embedding.weight, std=0.3)
        nn.init.normal_(self.towers.positional_embedding, std=0.3)
        nn.init.normal_(self.towers.visual.positional_embedding, std=0.5)  # beside patches of pixels near 1

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings (B, E) of images in [-1, 1] and of token ids (B, L), and the logit scale."""
        image_features, text_features, scale = self.towers(images, ids)
        return image_features, text_features, scale

    def save(self, directory: Path) -> None:
        """Write open_clip's format: its model config as JSON and the weights as safetensors.

        The token embeddings, most of a small model's weights, are left out. No later stage changes them, so they are
        the same as the text encoder's.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": self.config}, indent=1) + "\n")
        state = {name: tensor.contiguous() for name, tensor in self.towers.state_dict().items() if name != _EMBEDDING}
        save_file(state, directory / "open_clip_model.safetensors")
        let_others_read(directory)

    @classmethod
    def load(cls, directory: Path, token_embedding: Tensor | None = None) -> Clip:
        """Load what `save` wrote, with the (vocabulary, width) embeddings of its text encoder.

        Without embeddings, load a complete model in open_clip's format.
        """
        config = json.loads((directory / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        module = cls(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=bool(config.get("quick_gelu", False)),
        )
        state = load_file(directory / "open_clip_model.safetensors")
        module.towers.load_state_dict(state if token_embedding is None else state | {_EMBEDDING: token_embedding})
        return module.eval()


def contrastive_loss(process: int = 0, processes: int = 1) -> ClipLoss:
    """(image features, text features, scale) -> CLIP's loss in nats over the batch of all processes together.

    It is log(B) for uninformative embeddings. Each process computes the whole loss and its gradient, so that the mean
    over processes is the gradient of one process with the whole batch.
    """
    return ClipLoss(gather_with_grad=True, rank=process, world_size=processes)


@torch.no_grad()
def text_model_of(clip: Clip) -> CLIPTextModel:
    """The text tower in transformers' format: the same weights under its names, last hidden states after ln_final."""
    state = clip.towers.state_dict()
    text = clip.config["text_cfg"]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=int(text["width"] * text["mlp_ratio"]),
            projection_dim=clip.config["embed_dim"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act=_activation(clip),
            bos_token_id=text["vocab_size"] - 2,
            eos_token_id=text["vocab_size"] - 1,
            pad_token_id=text["vocab_size"] - 1,
        )
    )
    renamed = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    model.load_state_dict(renamed | _layers(state, text["layers"]))
    return model.eval()


def _activation(clip: Clip) -> str:
    """transformers' name of the towers' activation."""
    return "quick_gelu" if clip.config.get("quick_gelu") else "gelu"


@torch.no_grad()
def image_model_of(clip: Clip) -> CLIPVisionModelWithProjection:
    """The image tower in transformers' format, for pictures as CLIPImageProcessor normalises them.

    This tower reads pixels in [-1, 1], y = 2 (deviation x + mean) - 1 of the processor's x. The patches are a linear
    map, so the factor joins its weights and the rest the embeddings of positions. Raises ModelError for a tower that is
    no vision transformer with a class token.
    """
    state = {name.removeprefix("visual."): t for name, t in clip.towers.state_dict().items() if "visual." in name}
    vision = clip.config["vision_cfg"]
    if "class_embedding" not in state or "ln_pre.weight" not in state:
        raise ModelError("this CLIP's image tower has no form in transformers. Give another image encoder")
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
            projection_dim=clip.config["embed_dim"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act=_activation(clip),
        )
    )
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    patches, places = state["conv1.weight"], state["positional_embedding"].clone()
    places[1:] += (patches * (2 * mean - 1)).sum((1, 2, 3))
    renamed = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": patches * 2 * deviation,
        "embeddings.position_embedding.weight": places,
        "visual_projection.weight": state["proj"].T,
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        renamed |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    renamed |= _layers(state, vision["layers"])
    prefix = "" if "pre_layrnorm.weight" in model.state_dict() else "vision_model."
    model.load_state_dict({n if n.startswith("visual_p") else prefix + n: t for n, t in renamed.items()})
    return model.eval()


def _layers(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The layers of a tower under transformers' names; open_clip stores query, key and value as one matrix."""
    renamed = {}
    for layer in range(count):
        source, target = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = state[f"{source}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"{target}self_attn.{name}_proj.{kind}"] = part
            for theirs, ours in _LAYER_NAMES.items():
                renamed[f"{target}{ours}.{kind}"] = state[f"{source}{theirs}.{kind}"]
    return renamed


_LAYER_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
