"""Tiny Z-Image, FLUX.2 klein and Qwen-Image with random weights, as diffusers itself writes them."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .flux import DYNAMIC
from .stable_diffusion_3 import autoencoder

WIDTH = 32
TEMPLATE = (  # what Qwen3's own comes to for one turn of the user
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer():
    """Bytes, and the marks of a chat."""
    vocabulary = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    made = Qwen2TokenizerFast(vocab=vocabulary, merges=[], additional_special_tokens=marks)
    made.chat_template = TEMPLATE
    return made


def _sizes(layers):
    return {
        "vocab_size": 320,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def qwen3(kind=Qwen3Model, layers=3):
    return kind(Qwen3Config(**_sizes(layers), head_dim=16, tie_word_embeddings=True))


def qwen2_vl():
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]}
    text = _sizes(2) | {"rope_parameters": rope}
    ids = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 300)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def _stirred(*networks):
    """Add noise to all weights: zeros and ones would hide faults."""
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[1024, 64, 64],
    )
    _stirred(transformer)
    return ZImagePipeline(
        transformer=transformer,
        vae=autoencoder(),
        text_encoder=qwen3(),
        tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_2(distilled=False):
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    _stirred(transformer, vae)
    vae.bn.running_mean += torch.randn(16)
    vae.bn.running_var *= torch.rand(16) + 0.5
    return Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=qwen3(Qwen3ForCausalLM, 28),
        tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        is_distilled=distilled,
    )


def qwen_image():
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    _stirred(transformer, vae)
    shifting = DYNAMIC | {"shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=qwen2_vl(),
        tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
    )


MAKERS = {
    "Z-Image": z_image,
    "FLUX.2 klein": flux_2,
    "FLUX.2 klein distilled": lambda: flux_2(distilled=True),
    "Qwen-Image": qwen_image,
}


def pipeline(name, seed=0):
    """diffusers' own pipeline, weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MAKERS[name]()
    made.set_progress_bar_config(disable=True)
    return made
