"""Stable Diffusion 1.5, 2.1 and XL with random weights, as diffusers itself writes them: exact in size, or tiny.

The configs are those of the published models; tiny ones have the same blocks with fewer channels and layers.
"""

import shutil

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff import LatentDiffusionPipeline
from latentdiff.families.loading import stored_model
from latentdiff.networks.encoders.clip import clip_tokenizer
from latentdiff.runtime.export import export

FAMILIES = ("1", "2", "XL")
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def unet(family, tiny, in_channels=4):
    later = family != "1"
    channels = {"1": (320, 640, 1280, 1280), "2": (320, 640, 1280, 1280), "XL": (320, 640, 1280)}[family]
    depths = {"1": (1, 1, 1, 0), "2": (1, 1, 1, 0), "XL": (0, 2, 10)}[family]
    if tiny:
        channels, depths = {"1": ((32, 64), (1, 0)), "2": ((64, 128), (1, 0)), "XL": ((64, 64, 128), (0, 1, 2))}[family]
    config = {
        "sample_size": {"1": 64, "2": 96, "XL": 128}[family] if not tiny else 8,
        "in_channels": in_channels,
        "block_out_channels": channels,
        "layers_per_block": 1 if tiny else 2,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        "cross_attention_dim": sum(width(encoder, tiny) for encoder in encoders(family)),
        "attention_head_dim": tuple(c // 64 for c in channels) if later else 8,
        "use_linear_projection": later,
    }
    if family == "XL":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + width("bigG", tiny),
        }
    return UNet2DConditionModel(**config)


def vae(family, tiny):
    channels = (32, 32, 64, 64) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        scaling_factor=0.13025 if family == "XL" else 0.18215,
        sample_size={"1": 512, "2": 768, "XL": 1024}[family],
    )


def encoders(family):
    return {"1": ("L",), "2": ("H",), "XL": ("L", "bigG")}[family]


def width(encoder, tiny):
    return ({"L": 64, "H": 128, "bigG": 128} if tiny else {"L": 768, "H": 1024, "bigG": 1280})[encoder]


def text_encoder(encoder, tiny):
    wide = width(encoder, tiny)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=wide,
        intermediate_size=4 * wide if not tiny else wide,
        projection_dim=wide,
        num_hidden_layers=4 if tiny else {"L": 12, "H": 23, "bigG": 32}[encoder],
        num_attention_heads=wide // 64,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if encoder == "L" else "gelu",
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407 if encoder == "L" else 0,
    )
    return (CLIPTextModelWithProjection if encoder == "bigG" else CLIPTextModel)(config)


def stored(path, variant=None):
    """Our pipeline of a folder or file, in the precision in which it is stored."""
    return LatentDiffusionPipeline(stored_model(path, variant))


def load(folder):
    """Our pipeline of a folder, on the CPU."""
    return LatentDiffusionPipeline.from_pretrained(folder, device="cpu")


def openvino_like_torch(folder, scratch, prompt, **options):
    """Export a copy of the model in `folder`, check that it draws what torch draws; return the OpenVINO pipeline."""
    copy = shutil.copytree(folder, scratch / "model")
    export(load(copy).model, copy)
    compiled = LatentDiffusionPipeline.from_pretrained(copy, runtime="openvino", torch_dtype="float32")
    options = {"num_inference_steps": 3, "seed": 1, "output_type": "uint8", "num_images_per_prompt": 2, **options}
    first, second = (pipe(prompt, **options).images.astype(int) for pipe in (compiled, load(folder)))
    assert np.abs(first - second).max() <= 1
    return compiled


def pipeline(family, tiny=True, inpainting=False, seed=0, prediction=None):
    """Diffusers' own pipeline of one family, weights drawn from a seed."""
    prediction = prediction or ("v_prediction" if family == "2" else "epsilon")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, autoencoder = unet(family, tiny, 9 if inpainting else 4), vae(family, tiny)
        texts = [text_encoder(encoder, tiny) for encoder in encoders(family)]
    for parameter in network.parameters():  # norms start at one and biases at zero, which would hide faults
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    parts = {
        "unet": network,
        "vae": autoencoder,
        "text_encoder": texts[0],
        "tokenizer": clip_tokenizer(77, pad="!" if family == "2" else "<|endoftext|>"),
        "scheduler": DDIMScheduler(**SCHEDULE, prediction_type=prediction),
    }
    if family == "XL":
        made = StableDiffusionXLPipeline(
            **parts, text_encoder_2=texts[1], tokenizer_2=clip_tokenizer(77, pad="!"), add_watermarker=False
        )
    else:
        kind = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
        made = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
