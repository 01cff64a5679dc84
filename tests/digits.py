"""A family of models in one file: a diffusion transformer on pixels under the label of a class (Peebles & Xie 2023).

It shows what a new family takes: a backbone, an encoder, and an entry of FAMILIES.
"""

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.families.card import model_card
from latentdiff.families.scheduler import read_scheduler
from latentdiff.model import Family, Model, TorchPlace
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Reading
from latentdiff.networks.protocols import Spec
from latentdiff.networks.saving import save_network

CLASSES, SIDE = 10, 16


class LabelEncoder(nn.Module):
    """A digit as the prompt -> `label` (1,); the empty prompt is the class of no class."""

    length = 1

    def read(self, prompt, style):
        if prompt.strip() and not (prompt.strip().isdecimal() and int(prompt) < CLASSES):
            raise ConfigError(f"prompt must be a digit (got {prompt[:20]!r})")
        return Reading(1, 1, 0)

    def encode(self, prompt):
        self.read(prompt.text, prompt.style)
        return Conditions({"label": torch.tensor([int(prompt.text or CLASSES)])})


class DiT(nn.Module):
    """(x, t, conditions with `label`) -> output like x."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # captions are dropped by the training, by its seed

    @classmethod
    def create(cls):
        size = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2, "norm_num_groups": 1}
        shape = {"sample_size": SIDE, "patch_size": 4, "in_channels": 3, "out_channels": 3}
        return cls(DiTTransformer2DModel(**size, **shape, num_embeds_ada_norm=CLASSES))

    @property
    def spec(self):
        return Spec(3, 3, self.model.config.patch_size, {"label": (1,)})

    @property
    def dtype(self):
        return self.model.dtype

    def forward(self, x, t, conditions):
        count = conditions.count
        labels = (conditions.flattened() if count else conditions)["label"][:, 0].long()
        rows = x.repeat(count or 1, 1, 1, 1).to(self.dtype)
        times = torch.as_tensor(t, device=x.device).expand(len(x)).repeat(count or 1)
        output = self.model(rows, times, labels).sample
        return output.reshape(count, *x.shape) if count else output

    @torch.no_grad()
    def predict(self, x, time, conditions):
        return self(x, time, conditions).float()


def assembled(network, path, prediction, card):
    place, parts = TorchPlace(), {"transformer": network.model}
    return Model(network, LabelEncoder(), IdentityCodec(), path, prediction, card, place, FAMILY, parts)


def load(directory, variant):
    network = DiT(DiTTransformer2DModel.from_pretrained(directory / "transformer").eval())
    path, prediction, *_ = read_scheduler(directory)
    return assembled(network, path, prediction, model_card(directory, path.T, variant))


def save(model, directory):
    save_network(model.backbone.model, directory / "transformer")


def index(model):
    transformer, scheduler = ["diffusers", "DiTTransformer2DModel"], ["diffusers", "DDIMScheduler"]
    return {"_class_name": "DigitPipeline", "transformer": transformer, "scheduler": scheduler}


PARTS = {"transformer": frozenset({"DiTTransformer2DModel"})}
FAMILY = Family("digits", frozenset({"DigitPipeline"}), PARTS, frozenset(), load, save, index)
