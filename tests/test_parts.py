"""Single files of flow-matching families: known by names and shapes alone, and joined with a folder."""

import copy
import math
import re
import shutil

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as conversion
from safetensors.torch import load_file, save_file

from latentdiff.core.errors import ModelError
from latentdiff.families import FAMILIES
from latentdiff.families.parts import joined, transformer_in, transformer_of
from latentdiff.networks.blocks import blocks_of, dequantized, in_blocks, put_in_blocks, state_of
from latentdiff.networks.saving import save_gguf
from latentdiff.pipeline import LatentDiffusionPipeline

from . import flow_models, flux, stable_diffusion, stable_diffusion_3
from .stable_diffusion import load

PROMPT = "a castle on the hill"
OPTIONS = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}


# --- original names, the other way round than diffusers' conversion ---


def _renamed(state, pairs):
    """Names by regular expressions, each name by the first that matches."""
    made = {}
    for name, tensor in state.items():
        pattern, replacement = next((each for each in pairs if re.search(each[0], name)), ("", ""))
        made[re.sub(pattern, replacement, name, count=1) if pattern else name] = tensor
    return made


def _fused(state, group, names, to, dim=0):
    """Each block's weights of these names as one, in this order."""
    for kind in ("weight", "bias"):
        blocks = {re.match(group, name)[0] for name in state if re.match(group, name)}
        for block in blocks:
            keys = [f"{block}{name}.{kind}" for name in names]
            if all(key in state for key in keys):
                state[f"{block}{to}.{kind}"] = torch.cat([state.pop(key) for key in keys], dim)
    return state


def _swapped(tensor):
    """Scale and shift in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def z_image_names(state):
    state = _fused(dict(state), r"\w+\.\d+\.attention\.", ("to_q", "to_k", "to_v"), "qkv")
    return _renamed(
        state,
        [
            (r"all_final_layer\.2-1\.", "final_layer."),
            (r"all_x_embedder\.2-1\.", "x_embedder."),
            (r"norm_([qk])\.", r"\1_norm."),
            (r"attention\.to_out\.0\.", "attention.out."),
        ],
    )


def flux_names(state):
    state = _fused(dict(state), r"transformer_blocks\.\d+\.attn\.", ("to_q", "to_k", "to_v"), "img_qkv")
    state = _fused(state, r"transformer_blocks\.\d+\.attn\.", ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    state = _fused(state, r"single_transformer_blocks\.\d+\.", single, "linear1")
    state = {name: _swapped(value) if name.startswith("norm_out") else value for name, value in state.items()}
    block = r"^transformer_blocks\.(\d+)\."
    return _renamed(
        state,
        [
            (r"^x_embedder", "img_in"),
            (r"^context_embedder", "txt_in"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^proj_out", "final_layer.linear"),
            (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
            (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
            (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
            (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
            (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
            (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
            (block + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
            (block + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
            (block + r"attn\.(img|txt)_qkv", r"double_blocks.\1.\2_attn.qkv"),
            (block + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
            (block + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
            (block + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
            (block + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
            (block + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
            (block + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
            (block + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
            (block + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
            (block + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
            (block + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
            (r"^single_transformer_blocks\.(\d+)\.linear1", r"single_blocks.\1.linear1"),
            (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
            (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
            (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        ],
    )


def flux_2_names(state):
    state = _fused(dict(state), r"transformer_blocks\.\d+\.attn\.", ("to_q", "to_k", "to_v"), "img_qkv")
    state = _fused(state, r"transformer_blocks\.\d+\.attn\.", ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")
    state = {name: _swapped(value) if name.startswith("norm_out") else value for name, value in state.items()}
    block, single = r"^transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
    return _renamed(
        state,
        [
            (r"^x_embedder", "img_in"),
            (r"^context_embedder", "txt_in"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^proj_out", "final_layer.linear"),
            (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
            (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
            (r"^(double|single)_stream_modulation(\w*)\.linear", r"\1_stream_modulation\2.lin"),
            (block + r"attn\.(img|txt)_qkv", r"double_blocks.\1.\2_attn.qkv"),
            (block + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
            (block + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
            (block + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
            (block + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
            (block + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
            (block + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
            (block + r"ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
            (block + r"ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
            (block + r"ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
            (block + r"ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
            (single + r"attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
            (single + r"attn\.to_out", r"single_blocks.\1.linear2"),
            (single + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
            (single + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        ],
    )


def stable_diffusion_3_names(state):
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    state = dict(state)
    for attn in ("attn", "attn2"):
        group = rf"transformer_blocks\.\d+\.{attn}\."
        state = _fused(state, group, ("to_q", "to_k", "to_v"), "x_qkv")
        state = _fused(state, group, ("add_q_proj", "add_k_proj", "add_v_proj"), "context_qkv")
    swaps = ("norm_out.", f"transformer_blocks.{last}.norm1_context.")
    state = {name: _swapped(value) if name.startswith(swaps) else value for name, value in state.items()}
    block = r"^transformer_blocks\.(\d+)\."
    return _renamed(
        state,
        [
            (r"^pos_embed\.pos_embed", "pos_embed"),
            (r"^pos_embed\.proj", "x_embedder.proj"),
            (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
            (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^proj_out", "final_layer.linear"),
            (block + r"(attn2?)\.x_qkv", r"joint_blocks.\1.x_block.\2.qkv"),
            (block + r"attn\.context_qkv", r"joint_blocks.\1.context_block.attn.qkv"),
            (block + r"(attn2?)\.norm_([qk])\.", r"joint_blocks.\1.x_block.\2.ln_\3."),
            (block + r"attn\.norm_added_([qk])\.", r"joint_blocks.\1.context_block.attn.ln_\2."),
            (block + r"(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
            (block + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
            (block + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
            (block + r"norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
            (block + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
            (block + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
            (block + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
            (block + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
        ],
    )


# --- detection at true sizes, by shapes alone ---

SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
SD3_MEDIUM = SD35_MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
FLUX_DEV = {
    "in_channels": 64, "out_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
KLEIN_4B = {
    "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0, "guidance_embeds": False,
    "axes_dims_rope": (32, 32, 32, 32),
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
    "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
}  # fmt: skip
QWEN_IMAGE = {
    "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
EXACT = {  # name -> family, diffusers' class, its config at the true size, original names, billions of parameters
    "SD3 medium": ("Stable Diffusion 3", "SD3Transformer2DModel", SD3_MEDIUM, stable_diffusion_3_names, 2.08),
    "SD3.5 medium": ("Stable Diffusion 3", "SD3Transformer2DModel", SD35_MEDIUM, stable_diffusion_3_names, 2.47),
    "SD3.5 large": ("Stable Diffusion 3", "SD3Transformer2DModel", SD35_LARGE, stable_diffusion_3_names, 8.06),
    "Flux dev": ("Flux.1", "FluxTransformer2DModel", FLUX_DEV, flux_names, 11.9),
    "Flux schnell": ("Flux.1", "FluxTransformer2DModel", FLUX_DEV | {"guidance_embeds": False}, flux_names, 11.89),
    "FLUX.2 klein": ("FLUX.2 klein", "Flux2Transformer2DModel", KLEIN_4B, flux_2_names, 3.88),
    "Z-Image": ("Z-Image", "ZImageTransformer2DModel", Z_IMAGE, z_image_names, 6.15),
    "Z-Image, diffusers' names": ("Z-Image", "ZImageTransformer2DModel", Z_IMAGE, dict, 6.15),
    "Qwen-Image": ("Qwen-Image", "QwenImageTransformer2DModel", QWEN_IMAGE, dict, 20.4),
}


def skeleton(kind, config):
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


@pytest.mark.parametrize("name", EXACT)
def test_transformers_of_true_size_are_known_by_shapes(name):
    """One family knows it, with the config that it has; diffusers' conversion gives its weights back."""
    family, kind, config, names, billions = EXACT[name]
    network = skeleton(kind, config)
    state = network.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, rel=0.02)
    original = names(state)
    shapes = {key: tuple(tensor.shape) for key, tensor in original.items()}
    known = [each.name for each in FAMILIES if each.layout and each.layout.config(shapes) is not None]
    assert known == [family]
    result = transformer_of(shapes)
    assert result.config == config
    again = {key: tuple(tensor.shape) for key, tensor in result.family.layout.converted(dict(original)).items()}
    assert again == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("family", ["1", "XL"])
def test_unets_of_true_size_are_no_transformer(family):
    with torch.device("meta"):
        unet = stable_diffusion.unet(family, tiny=False)
    for prefix in ("", "model.diffusion_model."):
        assert transformer_of({prefix + key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}) is None


# --- weights ---

FILES = {
    "Z-Image": (flow_models.z_image, z_image_names),
    "FLUX.2 klein": (flow_models.flux_2, flux_2_names),
    "Qwen-Image": (flow_models.qwen_image, dict),
    "Stable Diffusion 3": (stable_diffusion_3.pipeline, stable_diffusion_3_names),
}
PREFIXES = {"Z-Image": "model.diffusion_model.", "Qwen-Image": "diffusion_model."}


@pytest.fixture(scope="module", params=FILES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """diffusers' pipeline, its folder, and its transformer in a file of original names."""
    place = tmp_path_factory.mktemp("parts")
    make, names = FILES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
    pipe.save_pretrained(place / "folder")
    prefix = PREFIXES.get(family, "")
    state = {prefix + name: tensor.contiguous() for name, tensor in names(pipe.transformer.state_dict()).items()}
    save_file(state, place / "transformer.safetensors")
    return pipe, place / "folder", place / "transformer.safetensors"


def test_a_joined_file_draws_what_its_folder_draws(family, saved, tmp_path):
    """To the bit; the folder's own transformer is not read."""
    _, folder, file = saved
    assert transformer_in(file).family.name == family
    base = shutil.copytree(folder, tmp_path / "base")
    for weights in (base / "transformer").glob("*.safetensors"):
        weights.unlink()
    pipe = LatentDiffusionPipeline(joined([file], base))
    assert torch.equal(pipe(PROMPT, **OPTIONS).images, load(folder)(PROMPT, **OPTIONS).images)


def test_every_part_from_files(family, saved, tmp_path):
    """A base of configs and tokenizers alone; VAE and text encoders come from files, in other tools' names."""
    theirs, folder, file = saved
    base = shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    state = {}
    for part, module in theirs.components.items():
        if part.startswith("text_encoder") and module is not None:
            save_file({n: t.contiguous() for n, t in _of_files(module).items()}, tmp_path / f"{part}.safetensors")
        elif part == "vae":
            state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    files = [file, *sorted(tmp_path.glob("*.safetensors"))]
    pipe = LatentDiffusionPipeline(joined(files, base))
    assert torch.equal(pipe(PROMPT, **OPTIONS).images, load(folder)(PROMPT, **OPTIONS).images)


@pytest.mark.parametrize("kind", [pytest.param("q8_0", marks=pytest.mark.slow), "q4_0"])
def test_a_gguf_file(family, saved, kind, tmp_path, call):
    """As people have them: original names, weights of blocks quantized. Each number is the file's."""
    _, folder, file = saved
    state = load_file(file)
    wide = [n for n, t in state.items() if t.ndim == 2 and t.shape[1] % 32 == 0 and re.search(r"\.\d+\.", n)]
    state |= {name: in_blocks(state[name], kind) for name in wide}
    path = tmp_path / "model.gguf"
    save_gguf(state, path, "any")
    assert transformer_in(path).family.name == family
    code, _, err = call("generate", PROMPT, "-m", path)
    assert (code, f"holds the transformer of {family} and no tokenizer" in err) == (4, True), err
    pipe = LatentDiffusionPipeline(joined([path], folder))
    numbers = {name: dequantized(t) if name in wide else t for name, t in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in numbers.items()}, tmp_path / "numbers.safetensors")
    whole = LatentDiffusionPipeline(joined([tmp_path / "numbers.safetensors"], folder))
    assert torch.equal(pipe(PROMPT, **OPTIONS).images, whole(PROMPT, **OPTIONS).images)
    blocks = blocks_of(pipe.components["transformer"])
    assert len(blocks) >= len(wide) > 0
    assert call("convert", path, tmp_path / "out", "--base", folder)[0] == 0
    assert torch.equal(load(tmp_path / "out")(PROMPT, **OPTIONS).images, pipe(PROMPT, **OPTIONS).images)


@pytest.mark.parametrize("in_blocks", [False, True], ids=["numbers", "blocks"])
def test_a_file_under_diffusers_names(family, saved, in_blocks, tmp_path):
    theirs, folder, _ = saved
    network = copy.deepcopy(theirs.transformer)
    if in_blocks:
        put_in_blocks(network, "q8_0")
        save_gguf(state_of(network), tmp_path / "x", "any")
    else:
        save_file({name: t.contiguous() for name, t in network.state_dict().items()}, tmp_path / "x")
    parts = joined([tmp_path / "x"], folder).parts["transformer"].state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in network.state_dict().items())


def _of_files(module):
    """The weights under the names that files have, without tied copies."""
    names, seen = {}, set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            names[name] = tensor
    return names


def test_what_does_not_fit_is_refused(family, saved, tmp_path, call):
    _, folder, file = saved
    code, _, err = call("generate", PROMPT, "-m", file)
    assert (code, f"holds the transformer of {family} and no tokenizer" in err) == (4, True), err
    code, out, _ = call("info", file)
    assert (code, f'"kind": "{family}, transformer"' in out) == (0, True)
    with pytest.raises(ModelError, match="two of the files hold transformer"):
        joined([file, file], folder)
    other = tmp_path / "other.safetensors"
    save_file({"odd.weight": torch.zeros(2)}, other)
    with pytest.raises(ModelError, match=r"odd\.weight belongs to no known part of"):
        joined([other], folder)
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, other)
    with pytest.raises(ModelError, match=r"no transformer in|a VAE of this class|cannot load|belongs to no known part"):
        joined([other], folder)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot load .*cut\.safetensors: .*file not fully covered"):
        joined([cut], folder)
    flux.pipeline().save_pretrained(tmp_path / "flux")
    with pytest.raises(ModelError, match=rf"belongs to {re.escape(family)}, .* to Flux\.1"):
        joined([file], tmp_path / "flux")


def test_by_the_command_line(family, saved, tmp_path, call):
    """The result is a folder that draws the same, and diffusers opens it."""
    _, folder, file = saved
    out = tmp_path / "joined"
    code, _, err = call("convert", file, out, "--base", folder)
    assert code == 0, err
    assert torch.equal(load(out)(PROMPT, **OPTIONS).images, load(folder)(PROMPT, **OPTIONS).images)
    assert load(out).card.hash == load(folder).card.hash
    diffusers.DiffusionPipeline.from_pretrained(out)
    code, _, err = call("convert", file, tmp_path / "x", "--part", folder / "vae")
    assert (code, "--part requires --base" in err) == (2, True)
    code, _, err = call("convert", folder, tmp_path / "x", "--base", folder)
    assert (code, "--base requires a transformer file" in err) == (2, True)


def test_a_vae_of_original_names(tmp_path):
    """Flux.1's and Stable Diffusion 3's file of a VAE has the names of latent diffusion."""
    pipe = stable_diffusion_3.pipeline()
    pipe.save_pretrained(tmp_path / "folder")
    from latentdiff.formats.original import vae_name

    state = pipe.vae.state_dict()
    original = {vae_name(name, 4): tensor.contiguous() for name, tensor in state.items()}
    again = conversion.convert_ldm_vae_checkpoint(dict(original), pipe.vae.config)
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    save_file(original, tmp_path / "ae.safetensors")
    names = stable_diffusion_3_names(pipe.transformer.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in names.items()}, tmp_path / "transformer.safetensors")
    model = joined([tmp_path / "transformer.safetensors", tmp_path / "ae.safetensors"], tmp_path / "folder")
    for name, tensor in model.codec.vae.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(("scale", "beside"), [("scale_weight", "scaled_fp8"), ("weight_scale", None)])
def test_float8_with_a_scale_for_each_weight(scale, beside, tmp_path):
    """ComfyUI's scaled files: each number is the product, rounded once."""
    pipe = flow_models.pipeline("Z-Image")
    pipe.save_pretrained(tmp_path / "folder")
    state = z_image_names(pipe.transformer.state_dict())
    wide = [name for name, tensor in state.items() if tensor.ndim == 2 and "layers" in name]
    expected = dict(state)
    for name in wide:
        factor = state[name].abs().max() / 448
        narrow = (state[name] / factor).to(torch.float8_e4m3fn)
        expected[name] = (narrow.float() * factor).bfloat16()
        state |= {name: narrow, name.replace("weight", scale): factor}
        state |= {name.replace("weight", "scale_input"): torch.ones(())} if beside else {}
    state |= {beside: torch.zeros(2)} if beside else {name.replace("weight", "comfy_quant"): torch.zeros(9).byte()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "y.safetensors")
    one, other = (joined([tmp_path / name], tmp_path / "folder") for name in ("x.safetensors", "y.safetensors"))
    weights = zip(one.parts["transformer"].parameters(), other.parts["transformer"].parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in weights)


def _narrow(state, change):
    """All weights of the layers in float8 beside their scales, then a change."""
    for name in [name for name, tensor in state.items() if tensor.ndim == 2 and "layers" in name]:
        state |= {name: state[name].to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): torch.ones(())}
    state["scaled_fp8"] = torch.zeros(2)
    change(state)
    return {name: tensor.contiguous() for name, tensor in state.items()}


FIRST = "layers.0.attention.qkv."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{FIRST}scale_weight"), "has no scale, which others have"),
        (lambda state: state.update({f"{FIRST}weight_scale": torch.ones(())}), "requires one scale"),
        (lambda state: state.update({f"{FIRST}scale_weight": torch.tensor(torch.nan)}), "requires one scale"),
        (
            lambda state: [state.pop(name) for name in list(state) if name.endswith("scale_weight")],
            "has no scale, which others have",
        ),
    ],
)
def test_a_scale_too_few_or_too_many(change, message, tmp_path):
    pipe = flow_models.pipeline("Z-Image")
    pipe.save_pretrained(tmp_path / "folder")
    save_file(_narrow(z_image_names(pipe.transformer.state_dict()), change), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        joined([tmp_path / "x.safetensors"], tmp_path / "folder")


@pytest.mark.parametrize("scale", [torch.ones(()), torch.ones(48, 1)])
def test_other_weights_with_scales_are_refused(scale, tmp_path):
    """Of numbers in 32 bits a scale is not known; nor are scales of blocks."""
    pipe = flow_models.pipeline("Z-Image")
    pipe.save_pretrained(tmp_path / "folder")
    state = z_image_names(pipe.transformer.state_dict()) | {"layers.0.attention.qkv.scale_weight": scale}
    if scale.ndim:
        state["layers.0.attention.qkv.weight"] = state["layers.0.attention.qkv.weight"].to(torch.float8_e4m3fn)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="weights with scales of their own are supported for float8 alone"):
        joined([tmp_path / "x.safetensors"], tmp_path / "folder")


@pytest.fixture(scope="module")
def z(tmp_path_factory):
    """A Z-Image, its folder, and the weights of its transformer and text encoder under files' names."""
    place = tmp_path_factory.mktemp("z")
    pipe = flow_models.pipeline("Z-Image")
    pipe.save_pretrained(place / "folder")
    return place / "folder", z_image_names(pipe.transformer.state_dict()), _of_files(pipe.text_encoder)


def _written(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def test_what_a_text_encoder_has_too_much_is_refused(z, tmp_path):
    """Nothing of a file is left out silently."""
    folder, transformer, text = z
    whole = _written(transformer, tmp_path / "z.safetensors")
    name = "layers.0.self_attn.q_proj.weight"
    for change, message in (
        ({f"{name}_scale": torch.ones(1)}, "scales of their own"),
        ({f"{name.removesuffix('.weight')}.comfy_quant": torch.ones(1)}, "scales of their own"),
        ({name: torch.ones(32, 32, dtype=torch.int8)}, "must be floating-point numbers"),
        ({name.replace(".0.", ".3."): torch.ones(32, 32)}, "belong to no layer, the first is layers.3"),
        ({"foo.bar": torch.ones(1)}, "belong to no layer, the first is foo.bar"),
        ({"embed_tokens.weight": torch.ones(32)}, "cannot load"),
    ):
        with pytest.raises(ModelError, match=message):
            joined([whole, _written(text | change, tmp_path / "t.safetensors")], folder)


@pytest.mark.parametrize("name", ["x_embedder.weight", "layers.0.attention.q_norm.weight", "cap_embedder.1.weight"])
def test_a_file_that_lacks_a_weight_is_one_line(z, tmp_path, call, name):
    folder, transformer, _ = z
    state = {key: tensor for key, tensor in transformer.items() if key != name}
    file = _written(state, tmp_path / "z.safetensors")
    code, _, err = call("info", file)
    expected = (0, False) if name.startswith("cap_embedder") else (4, True)  # without it, it is no Z-Image at all
    assert (code, name in err) == expected, err
    for words in (("generate", "a", "-m", file), ("convert", file, "out", "--base", folder)):
        code, _, err = call(*words)
        assert (code, err.count("\n")) == (4, 1), (words, err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.feed_forward.w1.weight": torch.ones(64, 64)}, r"w1.weight is \(64, 64\) in the file, \("),
        ({"extra.weight": torch.ones(3, 3)}, r"extra.weight is \(3, 3\) in the file, nothing in the config"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(z, tmp_path, change, message):
    folder, transformer, _ = z
    with pytest.raises(ModelError, match=message):
        joined([_written(transformer | change, tmp_path / "x.safetensors")], folder)


def test_absurd_numbers_and_configs(z, tmp_path):
    """A block of number 200,000 is refused at once; a base's config that describes nothing is not needed."""
    folder, transformer, _ = z
    far = transformer | {"layers.200000.foo.weight": torch.ones(1)}
    with pytest.raises(ModelError, match="layers are numbered up to 200000, but there are only 3"):
        joined([_written(far, tmp_path / "far.safetensors")], folder)
    file = _written(transformer, tmp_path / "z.safetensors")
    for tree in ("{}", '{"_class_name": "Foo"}', '{"dim": "x"}'):
        base = shutil.copytree(folder, tmp_path / f"base{len(tree)}")
        (base / "transformer" / "config.json").write_text(tree)
        with pytest.raises(ModelError, match="transformer"):  # the tiny model's axes are in no file
            joined([file], base)
    with pytest.raises(ModelError, match="no weights of variant fp16"):
        joined([file], folder, "fp16")


def test_eight_bit_weights_become_sixteen(tmp_path):
    pipe = flow_models.pipeline("Z-Image")
    pipe.save_pretrained(tmp_path / "folder")
    state = {name: t.to(torch.float8_e4m3fn) for name, t in z_image_names(pipe.transformer.state_dict()).items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    model = joined([tmp_path / "x.safetensors"], tmp_path / "folder")
    weight = model.backbone.model.layers[0].feed_forward.w1.weight
    assert weight.dtype == torch.float16
    expected = pipe.transformer.layers[0].feed_forward.w1.weight.to(torch.float8_e4m3fn).half()
    assert torch.equal(weight, expected)
    assert math.isfinite(float(model.backbone.predict(torch.zeros(1, 16, 4, 4), 500.0, _text(model)).sum()))


def _text(model):
    from latentdiff.networks.conditions import stacked
    from latentdiff.networks.encoders.prompt import Prompt

    return stacked([model.encoder.encode(Prompt(PROMPT))])
