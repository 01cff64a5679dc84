"""A tiny Flux.1 with random weights, dev or schnell, as diffusers itself writes it."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from latentdiff.networks.encoders.clip import clip_tokenizer

from .stable_diffusion_3 import autoencoder, clip_config, t5, t5_tokenizer

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}


def pipeline(dev=True, seed=0):
    """diffusers' own pipeline, weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        )
        for parameter in transformer.parameters():  # zeros and ones would hide faults
            parameter.data += 0.05 * torch.randn(parameter.shape)
        parts = {
            "vae": autoencoder(),
            "text_encoder": CLIPTextModel(clip_config(32)),
            "text_encoder_2": t5(len(words), 64),
        }
    made = FluxPipeline(
        transformer=transformer,
        tokenizer=clip_tokenizer(77),
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if dev else {"shift": 1.0})),
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made
