"""A tiny Stable Diffusion 3 with random weights, as diffusers itself writes it."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from latentdiff.networks.encoders.clip import clip_tokenizer

WIDTHS = 32, 64  # of the two CLIPs
WORDS = ("▁a", "▁castle", "▁on", "▁the", "▁hill", "▁red", "▁blurry")


def clip_config(width, act="quick_gelu"):
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=act,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )


def t5_tokenizer():
    """SentencePiece's form: unigrams of letters and some words."""
    plain = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=[*plain, *letters, *((word, -1.0) for word in WORDS)], extra_ids=0)


def t5(vocabulary, width):
    sizes = {"d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes))


def transformer(width):
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=width,
        caption_projection_dim=64,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=12,
        dual_attention_layers=(0,),  # as 3.5 has
        qk_norm="rms_norm",
    )


def autoencoder():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )


def exact(dtype=torch.bfloat16):
    """Stable Diffusion 3 medium in its true sizes without T5, random weights in that precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        shared = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        small = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=128,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                num_attention_heads=24,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=192,
            ),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
                sample_size=1024,
            ),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**shared, **small, projection_dim=768)),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(**shared, **large, projection_dim=1280, hidden_act="gelu")
            ),
            text_encoder_3=None,
            tokenizer=clip_tokenizer(77),
            tokenizer_2=clip_tokenizer(77, pad="!"),
            tokenizer_3=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).to(dtype)  # the table of positions is made in float32
    finally:
        torch.set_default_dtype(default)


def pipeline(with_t5=True, seed=0):
    """diffusers' own pipeline, weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words, width = t5_tokenizer(), 128
        parts = {
            "transformer": transformer(width),
            "vae": autoencoder(),
            "text_encoder": CLIPTextModelWithProjection(clip_config(WIDTHS[0])),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(WIDTHS[1], "gelu")),
            "text_encoder_3": t5(len(words), width) if with_t5 else None,
        }
        for parameter in parts["transformer"].parameters():  # zeros and ones would hide faults
            parameter.data += 0.05 * torch.randn(parameter.shape)
    made = StableDiffusion3Pipeline(
        **parts,
        tokenizer=clip_tokenizer(77),
        tokenizer_2=clip_tokenizer(77, pad="!"),
        tokenizer_3=words if with_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    made.set_progress_bar_config(disable=True)
    return made
