"""The adapters: what is folded, exported or renamed computes the same function."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch.nn import functional
from transformers import CLIPTextModel

from latentdiff.core.images import luminance, to_images, to_uint8
from latentdiff.families.clip import load_own_scorer
from latentdiff.families.weights import load_clip, load_text_encoder
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.clip import Clip, contrastive_loss, image_model_of, text_model_of
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.controls.ip_adapter import ImageEncoder
from latentdiff.networks.encoders.clip import END, START, TextEncoder, clip_tokenizer, learnt_tokenizer, tokenize
from latentdiff.networks.encoders.prompt import Prompt

PROMPTS = ["a red circle above a blue square", "", "Ein Größenwahn, 猫 & \U0001f600!", "3 green stars " * 20]


def autoencoder():
    torch.manual_seed(0)
    return KLAutoencoder.create((8, 16), 1, 4, 4).eval()


def random_images(count=3, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def small_unet(pooled_text=False):
    torch.manual_seed(0)
    return UNet.create(
        sample_size=8,
        channels=4,
        context_dim=16,
        block_out_channels=(16, 16),
        attention=(False, True),
        layers_per_block=1,
        num_heads=2,
        norm_num_groups=4,
        pooled_text=pooled_text,
    ).eval()


@torch.no_grad()
def test_a_time_for_each_sample_under_several_conditions():
    """The same outputs as one by one, (K, B, C, h, w)."""
    unet, generator = small_unet(), torch.Generator().manual_seed(1)
    x, times = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([100.0, 700.0])
    tokens = torch.randn(3, 2, 5, 16, generator=generator)
    output = unet.predict(x, times, Conditions({"tokens": tokens}, count=3))
    for k in range(3):
        for row in range(2):
            one = Conditions({"tokens": tokens[k, row : row + 1]})
            alone = unet.predict(x[row : row + 1], float(times[row]), one)
            torch.testing.assert_close(output[k, row], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folding_whitens_and_changes_no_picture():
    """z' = (z - mean) / std, log-variance - 2 log std, and the decoder undoes it exactly."""
    plain, folded = autoencoder(), autoencoder()
    center, std = torch.tensor([0.3, -1.0, 2.0, 0.0]), torch.tensor([0.1, 2.0, 0.5, 1.5])
    folded.fold_statistics(center, std)
    images = random_images()
    (mean, log_variance), (white, white_log_variance) = plain.encode(images), folded.encode(images)
    shaped, scale = center[:, None, None], std[:, None, None]
    torch.testing.assert_close(white, (mean - shaped) / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(white_log_variance, log_variance - 2 * scale.log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.decode(white), plain.decode(mean), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scale_and_shift_stay_inside():
    """A Stable Diffusion style scaling_factor is applied on the way in and out."""
    plain, scaled = autoencoder(), autoencoder()
    scaled = KLAutoencoder(scaled.vae)
    scaled.scale, scaled.shift = 0.18215, 0.1
    images = random_images()
    (mean, log_variance), (latents, latents_log_variance) = plain.encode(images), scaled.encode(images)
    torch.testing.assert_close(latents, (mean - 0.1) * 0.18215)
    torch.testing.assert_close(latents_log_variance, log_variance + 2 * np.log(0.18215))
    torch.testing.assert_close(scaled.decode(latents), plain.decode(mean), rtol=1e-4, atol=1e-5)


def test_identity_is_pixel_space():
    images = random_images()
    mean, log_variance = IdentityCodec(3).encode(images)
    assert torch.equal(mean, images)
    assert (log_variance.exp() == 0).all()


def test_tokenizer_is_clip_s():
    """The same ids as open_clip's own tokenizer, which pads with 0 where this pads with the end token."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer(context_length=32)(PROMPTS)
    ours = clip_tokenizer(32)(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = torch.where(theirs == 0, 49407, theirs)
    assert torch.equal(ours, theirs)


def test_a_learnt_tokenizer_reads_any_text():
    """Merges of the captions' most frequent pairs; every text comes back, and a known word is one token."""
    captions = ["a red circle above a blue square", "two blue squares", "a red ring"] * 5
    tokenizer = learnt_tokenizer(captions, 40, 32)
    assert len(tokenizer) <= 514 + 40
    assert tokenizer("red", add_special_tokens=False).input_ids == [tokenizer.get_vocab()["red</w>"]]
    for text in ("a red zebra", "caf\u00e9 \u732b \U0001f431!", "square-red"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)  # open_clip reads the text at the largest id
    again = learnt_tokenizer(captions, 40, 32)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    bytes_alone = learnt_tokenizer(captions, 0, 32)
    assert len(bytes_alone) == 514
    assert len(bytes_alone("red", add_special_tokens=False).input_ids) == 3


@torch.no_grad()
def test_a_text_tower_of_a_learnt_vocabulary(tmp_path):
    """Saved and loaded by transformers, it pools at the end token, as the towers do."""
    tokenizer = learnt_tokenizer(PROMPTS, 60, 32)
    clip = clip_towers(vocabulary=len(tokenizer))
    TextEncoder(tokenizer, text_model_of(clip)).save(tmp_path)
    clip.save(tmp_path / "clip")
    scorer = load_own_scorer(tmp_path)
    ids = tokenize(tokenizer, PROMPTS)
    expected = functional.normalize(clip.towers.encode_text(ids), dim=-1)
    torch.testing.assert_close(scorer.texts(PROMPTS), expected, rtol=1e-4, atol=1e-5)
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    pooled = model(ids).pooler_output @ clip.towers.text_projection
    torch.testing.assert_close(functional.normalize(pooled, dim=-1), expected, rtol=1e-4, atol=1e-5)


def clip_towers(**more):
    torch.manual_seed(0)
    return Clip.create(
        **more,
        image_size=16,
        embed_dim=24,
        text_width=32,
        text_layers=2,
        text_heads=4,
        max_length=32,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_head_width=16,
    ).eval()


def prompt_ids():
    return clip_tokenizer(32)(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def test_exported_text_tower_computes_the_same():
    clip, ids = clip_towers(), prompt_ids()
    model = text_model_of(clip)
    output = model(ids)
    expected = clip.towers.encode_text(ids)
    torch.testing.assert_close(output.pooler_output @ clip.towers.text_projection, expected, rtol=1e-4, atol=1e-5)
    ends = ids.argmax(1)
    torch.testing.assert_close(output.last_hidden_state[torch.arange(len(ids)), ends], output.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_image_tower_in_transformers_format(quick_gelu, tmp_path):
    """The same embedding of a picture, as CLIPImageProcessor makes it for others; the activation is kept."""
    clip = clip_towers().eval()
    if quick_gelu:
        plain, config = clip, clip.config
        clip = Clip(24, CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]), quick_gelu=True)
        clip.towers.load_state_dict(plain.towers.state_dict())
        clip.save(tmp_path)
        clip = Clip.load(tmp_path, plain.towers.token_embedding.weight)
        texts = [text_model_of(each)(prompt_ids()).last_hidden_state for each in (plain, clip)]
        assert (texts[0] - texts[1]).abs().max() > 1e-3
    side = clip.config["vision_cfg"]["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    expected = clip.towers.encode_image(to_images(pixels))
    encoder = ImageEncoder(image_model_of(clip))
    result = encoder(encoder.pixels(list(pixels)), all_states=False)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (result[0] - result[1]).abs().max() > 1e-2 * result.abs().max()


def test_a_new_text_tower_tells_words_apart():
    """One other word moves the context at that word by most of its length (0.84; 0.54 as open_clip draws them)."""
    encoder = TextEncoder(clip_tokenizer(32), text_model_of(clip_towers()))
    left, right = (
        encoder.encode(Prompt(f"a red circle {side} of a blue square"))["tokens"] for side in ("left", "right")
    )
    assert torch.equal(left[:4], right[:4]), "what comes before is not changed: the transformer is causal"
    assert (left[4] - right[4]).norm() > 0.7 * left[4].norm()


@torch.no_grad()
def test_clip_is_saved_without_what_the_text_encoder_holds(tmp_path):
    """A model folder keeps the token embeddings once; the towers come back from both places."""
    clip, images, ids = clip_towers(), random_images(len(PROMPTS)), prompt_ids()
    TextEncoder(clip_tokenizer(32), text_model_of(clip)).save(tmp_path)
    clip.save(tmp_path / "clip")
    again = load_clip(tmp_path)
    for ours, theirs in zip(again(images, ids), clip(images, ids), strict=True):
        assert torch.equal(ours, theirs)
    size = (tmp_path / "clip" / "open_clip_model.safetensors").stat().st_size
    assert size < 4 * 49408 * 32, "the embeddings alone are larger"


def test_clip_loss_at_chance_is_log_of_the_batch():
    same = torch.nn.functional.normalize(torch.ones(7, 8), dim=1)
    assert float(contrastive_loss()(same, same, torch.tensor(10.0))) == pytest.approx(np.log(7))
    assert float(contrastive_loss()(torch.eye(7, 8), torch.eye(7, 8), torch.tensor(100.0))) == pytest.approx(
        0, abs=1e-6
    )


@torch.no_grad()
def test_several_contexts_are_one_batch():
    unet = small_unet()
    x, contexts = torch.randn(3, 4, 8, 8), torch.randn(2, 3, 5, 16)
    both = unet(x, 10.0, Conditions({"tokens": contexts}, count=2))
    assert both.shape == (2, 3, 4, 8, 8)
    for k in range(2):
        torch.testing.assert_close(both[k], unet(x, 10.0, Conditions({"tokens": contexts[k]})), rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


@torch.no_grad()
def test_pooled_text_scales_and_shifts_and_loads_in_diffusers(tmp_path):
    """With attention's own answer taken away, the text still moves the output; diffusers computes the same."""
    plain, unet = small_unet(), small_unet(pooled_text=True)
    x, contexts = torch.randn(3, 4, 8, 8), torch.randn(2, 3, 5, 16)
    first, second = (Conditions({"tokens": context}) for context in contexts)
    for model in (plain, unet):
        for name, parameter in model.named_parameters():
            if "attn2.to_out" in name:
                parameter.zero_()
    assert torch.equal(plain(x, 10.0, first), plain(x, 10.0, second))
    assert (unet(x, 10.0, first) - unet(x, 10.0, second)).abs().max() > 1e-3
    unet.save(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)(x, 10.0, contexts[0]).sample
    assert torch.equal(theirs, unet(x, 10.0, first))


@torch.no_grad()
def test_plain_attention_computes_the_same():
    unet = small_unet()
    x, context = torch.randn(3, 4, 8, 8), Conditions({"tokens": torch.randn(3, 5, 16)})
    fused = unet(x, 10.0, context)
    unet.use_plain_attention()
    torch.testing.assert_close(unet(x, 10.0, context), fused, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_plain_attention_of_texts_computes_the_same(tiny_model):
    encoder = load_text_encoder(tiny_model)
    ids = encoder.tokenize(["a red circle", "two blue squares above a cyan star"])
    fused = encoder(ids)["tokens"]
    encoder.use_plain_attention()
    plain = encoder(ids)["tokens"]
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)
    with encoder.as_loaded():
        assert torch.equal(encoder(ids)["tokens"], fused)
    assert torch.equal(encoder(ids)["tokens"], plain)


def test_pictures_round_trip():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 values; 0 and 255 are the ends; outside is clamped."""
    pictures = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1).repeat(3, 3)
    images = to_images(pictures)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(images), pictures)
    np.testing.assert_array_equal(
        to_uint8(images * 3), np.clip((pictures / 127.5 - 1) * 3 * 127.5 + 127.5, 0, 255).round()
    )


def test_luminance():
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B; greys stay what they are."""
    colors = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [77, 77, 77]]]], np.uint8)
    assert luminance(colors).ravel().tolist() == [76, 150, 29, 77]


def test_saving_is_silent(pipe, tmp_path, capfd):
    """No bars of libraries, such as "Writing model shards"."""
    pipe.save_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
