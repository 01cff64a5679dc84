"""Caches: what is cached is what would be computed, to the bit; what changed is encoded again, and nothing else."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data.dataset import open_data
from latentdiff.data.store import Store
from latentdiff.families.weights import load_codec, load_text_encoder, weights_hash
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.encoders.clip import TextEncoder, clip_tokenizer
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.settings.config import parse_config
from latentdiff.stages import cache, encoding
from latentdiff.stages.ahead import parse_shard

from .pictures import as_jsonl, encoded, some_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return KLAutoencoder.create((8, 16), 1, 4, 4, 3).eval()


@pytest.fixture(scope="module")
def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return TextEncoder(clip_tokenizer(16), CLIPTextModel(config)).eval()


@pytest.fixture
def folder(tmp_path):
    return as_jsonl(tmp_path / "set", some_pictures(20))


def config_of(folder, dtype="float32", cached=True, **pictures):
    data = {"kind": "pictures", "pictures": {"source": str(folder), "bucket_step": 8, **pictures}}
    return parse_config({"image_size": 32, "data": data, "denoiser": {"cache": cached, "encode_dtype": dtype}})


def fill(config, root, autoencoder, share=(0, 1)):
    """The store, and how many pictures were encoded for it."""
    store = cache.latents_store(config.denoiser, autoencoder, root)
    examples = open_data(config).training
    return store, cache.fill_latents(config.denoiser, store, examples, autoencoder, CPU, share)


def keys_by_name(config):
    examples = open_data(config).training
    return {
        examples.pictures.picture(row).name: [examples.key(row, view) for view in examples.every_view(row)]
        for row in range(len(examples))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_precision_have_a_hash(dtype):
    """That of their names and bytes, in the order of the names, whatever their order in memory."""
    network = torch.nn.Conv2d(2, 3, 2).to(dtype)
    content = b"".join(name.encode() + bytes(network.get_parameter(name).data.flatten().view(torch.uint8).tolist())
                       for name in ("bias", "weight"))  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        assert weights_hash(network.to(memory_format=layout)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_moments_are_the_encoded_ones(folder, tmp_path, autoencoder, dtype, flip):
    """To the bit, whatever batch a row is in; new variants each epoch where pictures are mirrored."""
    config = config_of(folder, dtype, flip=flip, crop="content")
    examples, accelerator = open_data(config).training, Accelerator(cpu=True)
    (cached,) = cache.latents_of(config.denoiser, [examples], autoencoder, tmp_path, accelerator)
    other = config_of(folder, dtype, cached=False, flip=flip, crop="content")
    (anew,) = cache.latents_of(other.denoiser, [examples], autoencoder, tmp_path, accelerator)
    assert len(examples.pictures.buckets()) > 2
    for rows in examples.pictures.buckets().values():
        for epoch, size in ((0, 3), (1, 5), (2, 16)):
            keys = [(int(row), epoch) for row in rows[:size]]
            one, other = cached.moments(cached.batch(keys)), anew.moments(anew.batch(keys))
            assert one[0].shape[1:] == cached.shape(int(rows[0]))
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(one, other, strict=True))
    if flip:
        views = [examples.view(row, epoch).flipped for row in range(20) for epoch in range(20)]
        assert np.mean(views) == pytest.approx(0.5, abs=0.1)


def test_half_precision_holds_the_moments(autoencoder):
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    mean, log_variance = encoding.moments_of(autoencoder, images)
    with torch.no_grad():
        exact = autoencoder.encode(images)
    torch.testing.assert_close(mean.float(), exact[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(log_variance.float(), exact[1], rtol=1e-3, atol=1e-3)


def test_contexts_are_the_text_encoders(folder, tmp_path, text_encoder):
    """Cached and encoded anew the same bits; of a dropped caption the empty one's."""
    config, accelerator = config_of(folder), Accelerator(cpu=True)
    examples = open_data(config).training
    (cached,) = cache.captions_of(config.denoiser, [examples], text_encoder, tmp_path, accelerator)
    (anew,) = cache.captions_of(
        config_of(folder, cached=False).denoiser, [examples], text_encoder, tmp_path, accelerator
    )
    keys, kept = [(row, 0) for row in range(11)], [row != 3 for row in range(11)]
    one, other = (each.conditions(each.batch(keys, kept))["tokens"] for each in (cached, anew))
    assert torch.equal(one, other)
    words = [examples.caption(row, 0) if row != 3 else "" for row in range(11)]
    alone = torch.stack([text_encoder.encode(Prompt(caption, Style(False, False)))["tokens"] for caption in words])
    torch.testing.assert_close(one, alone, rtol=1e-3, atol=2e-3)
    assert not torch.equal(one[3], one[4])


def test_an_edit_encodes_what_changed(folder, tmp_path, autoencoder):
    """One picture edited, one removed, one new, one renamed: two are encoded."""
    config = config_of(folder)
    assert fill(config, tmp_path, autoencoder)[1] == 20
    assert fill(config, tmp_path, autoencoder)[1] == 0
    before = keys_by_name(config)
    Image.new("RGB", (40, 40), "red").save(folder / "000.png")
    (folder / "001.jpg").unlink()
    (folder / "002.webp").rename(folder / "renamed.webp")
    Image.new("RGB", (40, 40), "blue").save(folder / "new.png")
    lines = (folder / "metadata.jsonl").read_text().replace("002.webp", "renamed.webp").splitlines()
    lines = [line for line in lines if "001.jpg" not in line] + ['{"file_name": "new.png", "text": "new"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    after = keys_by_name(config)
    assert before["000.png"] != after["000.png"]
    assert before["002.webp"] == after["renamed.webp"]
    store, count = fill(config, tmp_path, autoencoder)
    assert count == 2
    assert len(store) == 22  # what is gone stays until the folder is deleted


def test_keys_hold_all_that_changes_the_pixels(folder):
    """And nothing else: captions, names and places are free."""
    first = keys_by_name(config_of(folder))
    for change in ({"crop": "content"}, {"background": "#000000"}, {"bucket_step": 16}):
        other = keys_by_name(config_of(folder, **change))
        assert any(other[name] != first[name] for name in first), change
    assert keys_by_name(config_of(folder, captions={"prefix": "x"})) == first


def test_another_network_is_another_folder(folder, tmp_path, autoencoder):
    torch.manual_seed(1)
    other = KLAutoencoder.create((8, 16), 1, 4, 4, 3).eval()
    stores = [cache.latents_store(config_of(folder).denoiser, network, tmp_path) for network in (autoencoder, other)]
    assert stores[0]._directory != stores[1]._directory
    rescaled = KLAutoencoder.create((8, 16), 1, 4, 4, 3).eval()
    rescaled.load_state_dict(autoencoder.state_dict())
    assert encoding.identity_of(rescaled) == encoding.identity_of(autoencoder)
    rescaled.vae.register_to_config(scaling_factor=0.5)
    assert encoding.identity_of(rescaled) != encoding.identity_of(autoencoder)


def test_where_a_network_lies_is_not_what_it_is(tmp_path, autoencoder, text_encoder, monkeypatch):
    """Loaded by another spelling of its path, or used before: the same identity."""
    autoencoder.save(tmp_path / "one" / "vae")
    monkeypatch.chdir(tmp_path)
    spelled = [load_codec(Path("one")), load_codec(tmp_path / "one")]
    assert len({encoding.identity_of(network) for network in spelled}) == 1
    text_encoder.save(tmp_path / "one")
    loaded = load_text_encoder(tmp_path / "one")
    before = encoding.identity_of(loaded)
    loaded.tokenize(["a word"])
    assert encoding.identity_of(loaded) == before
    loaded.save(tmp_path / "other")
    files = [(tmp_path / folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in ("one", "other")]
    assert files[0] == files[1]
    ids = text_encoder.tokenize(["a word", "two"])
    assert torch.equal(load_text_encoder(tmp_path / "other").tokenize(["a word", "two"]), ids)


def _job(folder, root, share, kill_after):
    torch.set_num_threads(1)  # forked after others began
    torch.manual_seed(0)
    autoencoder = KLAutoencoder.create((8, 16), 1, 4, 4, 3).eval()
    cache.ROWS_A_FILE = 2
    if kill_after:
        add, calls = Store.add, [0]

        def counted(self, *arguments):
            calls[0] += 1
            if calls[0] > kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            add(self, *arguments)

        Store.add = counted
    fill(config_of(folder), root, autoencoder, share)


def run_job(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_job, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_jobs_that_are_killed_and_run_again_with_another_number(folder, tmp_path):
    """0/3 done, 1/3 killed after one file, 2/3 done; then four jobs: the rows of a single run, each once."""
    for share, kill_after in (((0, 3), 0), ((1, 3), 1), ((2, 3), 0)):
        assert run_job(folder, tmp_path / "jobs", share, kill_after) == (-signal.SIGKILL if kill_after else 0)
    (directory,) = (tmp_path / "jobs").iterdir()
    assert 0 < len(Store(directory)) < 20
    for number in range(4):
        assert run_job(folder, tmp_path / "jobs", (number, 4), 0) == 0
    assert run_job(folder, tmp_path / "single", (0, 1), 0) == 0
    store, single = Store(directory), Store(tmp_path / "single" / directory.name)
    keys = [key for keys in keys_by_name(config_of(folder)).values() for key in keys]
    assert len(store) == len(single) == len(keys) == 20
    for key in keys:
        one, other = store.rows([key]), single.rows([key])
        assert all(torch.equal(one[name], other[name]) for name in ("mean", "log_variance"))
    headers = [safe_open(path, "pt").metadata() for path in directory.glob("[!.]*.safetensors")]
    assert sum(len(json.loads(header["keys"])) for header in headers) == 20


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "1/0", "0/2/3"])
def test_shards_that_are_none(text):
    with pytest.raises(ConfigError, match=r"--shard must be i/n with i from 0 to n - 1"):
        parse_shard(text)


def overflowing(autoencoder, factor):
    """The same network with a first layer whose outputs are `factor` times as large: normalised away by the next."""
    torch.manual_seed(0)
    copy = KLAutoencoder.create((8, 16), 1, 4, 4, 3).eval()
    with torch.no_grad():
        copy.vae.encoder.conv_in.weight *= factor
        copy.vae.encoder.conv_in.bias *= factor
    return copy


def test_what_overflows_is_computed_again_in_float32(folder, tmp_path, autoencoder):
    """Black pictures stay finite in float16 and others do not: each row is right, none is zero."""
    network = overflowing(autoencoder, 3e5)
    images = torch.cat([torch.zeros(3, 3, 32, 32), torch.rand(5, 3, 32, 32) * 2 - 1])
    narrow = encoding._moments(network, images, "float16")
    assert encoding.finite(*narrow).tolist() != [True] * 8
    mean, log_variance = encoding.moments_of(network, images, "float16")
    exact = encoding.moments_of(network, images)
    bad = ~encoding.finite(*narrow)
    assert encoding.finite(mean, log_variance).all()
    assert torch.equal(mean[bad], exact[0][bad])
    assert torch.equal(log_variance[bad], exact[1][bad])
    _, count = fill(config_of(folder, "float16"), tmp_path, network)
    assert count == 20


def test_a_picture_without_finite_latents_is_named(folder, tmp_path, autoencoder):
    """Nothing of its batch is stored."""
    network = overflowing(autoencoder, 1.0)
    original = network.encode

    def encode(images):
        mean, log_variance = original(images)
        red = (images[:, 0] > 0.99).flatten(1).all(1)
        return torch.where(red[:, None, None, None], torch.nan, mean), log_variance

    network.encode = encode
    (folder / "007.jpg").write_bytes(encoded(Image.new("RGB", (40, 40), "red"), "jpg", quality=100, subsampling=0))
    for dtype, precisions in (("float16", "float16 and float32"), ("float32", "float32")):
        with pytest.raises(DataError, match=rf"VAE gave non-finite latents for 007.jpg in {precisions}"):
            fill(config_of(folder, dtype), tmp_path, network)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_pixels_have_no_variance(folder, tmp_path):
    """The identity's log-variance is minus infinity, which is no fault."""
    store, count = fill(config_of(folder), tmp_path, IdentityCodec())
    assert count == 20
    (keys,) = list(keys_by_name(config_of(folder)).values())[:1]
    assert store.rows(keys)["log_variance"].isneginf().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": "random"}, "random crops cannot be cached"),
        ({"streaming": True, "cached": False}, "a streamed data set requires denoiser.cache = true"),
    ],
)
def test_what_cannot_be_cached_is_refused(folder, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(folder, **change)
