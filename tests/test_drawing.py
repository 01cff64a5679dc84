"""The ways of asking, on a model that is trained in a minute: what is kept, what is drawn, what is refused."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, NonFiniteError
from latentdiff.diffusion import noise
from latentdiff.diffusion.guidance import keep
from latentdiff.drawing import pixels
from latentdiff.drawing.batch import Batch, Job
from latentdiff.drawing.canvas import Margins, canvas
from latentdiff.drawing.closeup import box_of
from latentdiff.drawing.draw import batches_of, canvas_of, jobs_of
from latentdiff.drawing.passes import passes_of
from latentdiff.drawing.pixels import differentiable_decode, reconstruct
from latentdiff.drawing.plan import plan
from latentdiff.drawing.start import keyed, turned
from latentdiff.families.weights import load_unet
from latentdiff.networks.clip import Clip
from latentdiff.networks.conditions import Conditions, stacked
from latentdiff.networks.encoders.prompt import Prompt

from . import stable_diffusion

PROMPT = "a red circle above a blue square"
QUICK = {"num_inference_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def photo():
    """A picture with no flat part, 96 wide and 64 high."""
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def mask():
    marked = np.zeros((64, 96), np.uint8)
    marked[8:40, 16:48] = 255
    return marked


@pytest.fixture(scope="module")
def inpainter(pipe, tiny_model):
    """A network of nine channels around the same autoencoder."""
    torch.manual_seed(0)
    unet = load_unet(tiny_model)
    old = unet.model.conv_in
    unet.model.conv_in = torch.nn.Conv2d(9, old.out_channels, 3, padding=1)
    unet.model.register_to_config(in_channels=9)
    return LatentDiffusionPipeline(replace(pipe.model, backbone=unet.eval()))


def picture_of(pipe, **settings):
    return pipe(PROMPT, output_type="uint8", **QUICK | settings).images


# from a picture


def test_strength_is_how_much_is_drawn_over(pipe, photo):
    """The smaller the strength, the nearer to the given picture as the autoencoder reconstructs it."""
    kept = reconstruct(pipe.model, photo[None])[0].astype(int)
    settings = {"image": photo, "num_inference_steps": 20, "guidance_scale": 1.0}
    apart = [np.abs(picture_of(pipe, strength=strength, **settings)[0] - kept).mean() for strength in (0.05, 0.3, 1.0)]
    assert apart[0] < apart[1] < apart[2]
    assert pipe(PROMPT, image=photo, num_inference_steps=7, strength=0.5).metadata[0].steps == (3,)
    with pytest.raises(ConfigError, match=r"strength 0.1 of 4 steps is less than one step"):
        picture_of(pipe, image=photo, strength=0.1)
    with pytest.raises(ConfigError, match="strength requires an image"):
        picture_of(pipe, strength=0.5)


def test_the_start_is_the_closed_form(pipe, photo):
    """alpha x0 + sigma noise, x0 the posterior's mean, the noise that of the seed."""
    level = pipe.model.path.levels(4, "trailing")[2]
    known = pipe.encode(photo[None])
    own = torch.from_numpy(noise.normal((4, 32, 48), 1, "initial latents"))
    request = pipe.request(PROMPT, strength=0.5, **QUICK)
    batch = Batch(jobs_of(pipe.model, request, canvas_of(pipe.model, request, photo)))
    (only,) = passes_of(batch, pipe.painter, [])
    start = only.start(None, keyed(batch.jobs, pipe.model.codec.shape((64, 96)), pipe.model.array))
    torch.testing.assert_close(start.x, level.alpha * known + level.sigma * own)
    assert len(start.levels) == 3


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (100, 70)])
def test_a_picture_keeps_its_size(pipe, size):
    """Sides that cannot be drawn are padded, and the padding is cut off again."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    out = pipe(PROMPT, image=image, strength=0.5, output_type="uint8", **QUICK)
    assert out.images.shape == (1, *size, 3)
    assert (out.metadata[0].height, out.metadata[0].width) == size


def test_a_picture_may_be_resized(pipe, photo):
    assert picture_of(pipe, image=photo, strength=0.5, width=64, height=80).shape == (1, 80, 64, 3)


# inpainting


@pytest.mark.parametrize("kind", ["plain", "inpainter"])
@pytest.mark.parametrize("shape", [(64, 96), (61, 90)])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_what_is_not_masked_keeps_its_bits(pipe, inpainter, photo, mask, kind, shape, output_type):
    model = pipe if kind == "plain" else inpainter
    image, marked = photo[: shape[0], : shape[1]], mask[: shape[0], : shape[1]]
    settings = {"image": image, "mask_image": Image.fromarray(marked), "output_type": output_type}
    images = model(PROMPT, num_images_per_prompt=2, **QUICK, **settings).images
    if output_type != "pil":
        images = np.rint(255 * (images.permute(0, 2, 3, 1).numpy() if output_type == "pt" else images)).astype(np.uint8)
    pictures = [np.asarray(picture) for picture in images]
    for picture in pictures:
        assert np.array_equal(picture[marked == 0], image[marked == 0])
        assert (picture[marked == 255] != image[marked == 255]).mean() > 0.5


def test_what_is_kept_steers_what_is_drawn(pipe, photo, mask):
    """Another picture around the same mask: something else is drawn within it."""
    other = 255 - photo
    first, second = (picture_of(pipe, image=image, mask_image=mask)[0] for image in (photo, other))
    assert (first[mask == 255] != second[mask == 255]).mean() > 0.2


def test_nine_channels(inpainter, photo, mask, monkeypatch):
    """The network reads latents, the mask, and the latents of the picture that is grey where it is masked."""
    seen = []
    forward = inpainter.model.backbone.model.forward
    monkeypatch.setattr(
        inpainter.model.backbone.model, "forward", lambda x, *a, **k: (seen.append(x), forward(x, *a, **k))[1]
    )
    picture_of(inpainter, image=photo, mask_image=mask, guidance_scale=1.0)
    read = seen[0][0]
    assert read.shape == (9, 32, 48)
    small = mask[::2, ::2] == 255
    np.testing.assert_array_equal(read[4].numpy() == 1, small)
    hidden = np.where(mask[..., None] == 255, 127.5, photo) / 127.5 - 1
    expected = pixels.encode_images(inpainter.model, torch.from_numpy(hidden).permute(2, 0, 1)[None].float())
    torch.testing.assert_close(read[5:], expected[0])
    seen.clear()
    picture_of(inpainter, guidance_scale=1.0)
    assert (seen[0][0, 4] == 1).all(), "without a mask everything is drawn"


def test_masks_reach_every_latent_they_touch(pipe, photo):
    """A mask of one pixel: the latent above it is drawn, and the pixel with it."""
    marked = np.zeros((64, 96), bool)
    marked[33, 51] = True
    picture = picture_of(pipe, image=photo, mask_image=marked)[0]
    assert (picture != photo).any(-1).sum() <= 1
    assert np.array_equal(picture[~marked], photo[~marked])


def soft(photo):
    """A mask that rises from left to right, black and white at its ends."""
    return np.broadcast_to(np.linspace(0, 255, photo.shape[1]).round().astype(np.uint8), photo.shape[:2]).copy()


@pytest.mark.parametrize("kind", ["plain", "inpainter"])
def test_soft_masks_mix(pipe, inpainter, photo, kind):
    """given + w (drawn - given), pixel by pixel; black keeps its bits."""
    model, mask = pipe if kind == "plain" else inpainter, soft(photo)
    made = canvas(photo, mask, multiple=8)
    image = np.random.default_rng(0).uniform(-1, 1, (3, *photo.shape[:2])).astype(np.float32)
    share = np.where(mask < 8, 0, np.where(mask > 247, 255, mask)) / 255
    given = photo.transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(made.kept(image, np.asarray), given + share * (image - given), atol=1e-6)
    picture = picture_of(model, image=photo, mask_image=mask)[0]
    assert np.array_equal(picture[mask < 8], photo[mask < 8])
    apart = np.abs(picture.astype(int) - photo).mean((0, 2)).reshape(4, -1).mean(1)
    assert apart[0] < apart[1] < apart[3]


def test_a_soft_edge_is_drawn_in_the_last_steps(pipe, photo):
    """A weight w is known until the last w of the steps (differential diffusion, algorithm 1)."""
    levels = pipe.model.path.levels(4, "trailing")
    mask = np.array([0, 0.2, 0.25, 0.5, 0.6, 1], np.float32).reshape(1, 1, 1, 6)
    known, free = np.zeros((1, 1, 1, 6), np.float32), np.ones((1, 1, 1, 6), np.float32)
    denoise = keep(lambda x, level: free, known, mask, levels)
    rows = [denoise(known, level).ravel().tolist() for level in levels[:-1]]
    assert rows == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    between = pipe.model.path.level_of((levels[1].ratio * levels[2].ratio) ** 0.5)  # a sampler's step in between
    assert denoise(known, between).ravel().tolist() == rows[2]


def test_weights_of_a_mask_are_amounts_of_change(pipe, photo):
    """A grey mask changes less than a white one and more than strength would leave."""
    settings = {"image": photo, "num_inference_steps": 10, "guidance_scale": 1.0}
    apart = []
    for value in (80, 160, 255):
        picture = picture_of(pipe, mask_image=np.full(photo.shape[:2], value, np.uint8), **settings)[0]
        apart.append(np.abs(picture.astype(int) - photo).mean())
    assert apart[0] < apart[1] < apart[2]


def test_masks_that_jpeg_has_changed_are_hard(photo, mask):
    """Almost black is black, almost white is white; the hash is that of the hard mask."""
    noisy = np.clip(mask.astype(int) + np.random.default_rng(0).integers(-7, 8, mask.shape), 0, 255).astype(np.uint8)
    made = canvas(photo, noisy, multiple=8)
    assert np.array_equal(made.mask, mask)
    assert made.hash == canvas(photo, mask == 255, multiple=8).hash != canvas(photo, soft(photo), multiple=8).hash


def test_mask_blur(pipe, photo, mask):
    """The Gaussian of that deviation; what outpainting adds stays white, and the seam inside is soft."""
    made = canvas(photo, mask, multiple=8, blur=4.0)
    expected = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(4)))
    assert np.array_equal(made.mask, expected)
    outside = canvas(photo, multiple=8, margins=Margins(right=16), blur=4.0).mask
    assert (outside[:, 96:] == 255).all()
    assert (np.diff(outside[0, 86:97].astype(int)) > 0).all()
    assert (outside[:, :70] == 0).all()
    sharp, blurred = (picture_of(pipe, image=photo, outpaint=(0, 0, 16, 0), mask_blur=blur)[0] for blur in (0.0, 4.0))
    assert np.array_equal(sharp[:, :96], photo)
    assert not np.array_equal(blurred[:, 80:96], photo[:, 80:96])
    assert np.array_equal(blurred[:, :70], photo[:, :70])
    for settings, message in (
        ({}, "mask_blur requires an image"),
        ({"image": photo}, "mask_blur requires a mask or outpainting"),
    ):
        with pytest.raises(ConfigError, match=message):
            picture_of(pipe, mask_blur=3.0, **settings)


@pytest.mark.parametrize("seed", range(40))
def test_the_box_of_a_mask_is_that_of_diffusers(seed):
    """For spots of any place and size, with padding, in pictures of any shape, for any size to draw."""
    draw = np.random.default_rng(seed).integers
    height, width = draw(20, 200, 2)
    mask = np.zeros((height, width), np.uint8)
    top, left = draw(0, height), draw(0, width)
    mask[top : top + draw(1, 60), left : left + draw(1, 60)] = 255
    padding, size = int(draw(0, 40)), tuple(8 * int(n) for n in draw(1, 20, 2))
    expected = VaeImageProcessor.get_crop_region(Image.fromarray(mask), size[1], size[0], padding)
    box = box_of(mask, padding, size)
    assert box == expected
    assert (box.of(mask) == 255).sum() == (mask == 255).sum()


def test_only_the_masked_part_is_drawn(pipe, photo):
    """As the part alone would be drawn, when it has the size of the drawing; elsewhere every pixel stays."""
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[20:40, 30:50] = 255
    settings = {"image": photo, "mask_image": mask, "padding_mask_crop": 6, "width": 32, "height": 32}
    (whole,) = picture_of(pipe, **settings)
    assert whole.shape == photo.shape
    assert np.array_equal(whole[mask == 0], photo[mask == 0])
    part = {"image": photo[14:46, 24:56], "mask_image": mask[14:46, 24:56]}
    (alone,) = picture_of(pipe, **part)
    assert np.array_equal(whole[14:46, 24:56], alone)
    (larger,) = picture_of(pipe, **{**settings, "width": 64, "height": 64})
    assert np.array_equal(larger[mask == 0], photo[mask == 0])
    assert not np.array_equal(larger, whole)
    (resized,) = picture_of(
        pipe,
        image=np.asarray(Image.fromarray(photo[14:46, 24:56]).resize((64, 64), Image.LANCZOS)),
        mask_image=np.kron(mask[14:46, 24:56], np.ones((2, 2), np.uint8)),
    )
    small = np.asarray(Image.fromarray(resized).resize((32, 32), Image.LANCZOS)).astype(int)
    middle = np.s_[12:20, 12:20]  # farther from the mask's edge than resizing looks
    assert np.abs(larger[14:46, 24:56].astype(int) - small)[middle].max() <= 1  # of rounding before or after


def test_a_dot_is_drawn_however_small_it_becomes(photo):
    """A mask of one pixel, drawn at a sixteenth of the size, still has a white one; a soft mask stays soft."""
    large = np.tile(photo, (8, 8, 1))
    mask = np.zeros(large.shape[:2], np.uint8)
    mask[300, 400] = 255
    small = canvas(large, mask, multiple=8, closeup=(500, (32, 48))).mask
    assert set(np.unique(small)) == {0, 255}
    soft = canvas(large, mask, multiple=8, closeup=(8, (64, 64)), blur=3.0).mask
    assert len(np.unique(soft)) > 3


def test_closeups_that_are_refused_and_whole_sizes_in_one_call(pipe, photo, mask):
    for settings, message in (({}, "requires an image"), ({"image": photo}, "requires a mask or outpainting")):
        with pytest.raises(ConfigError, match=f"padding_mask_crop {message}"):
            picture_of(pipe, padding_mask_crop=0, **settings)
    assert canvas(photo, mask, multiple=8, closeup=(0, (64, 64))).hash != canvas(photo, mask, multiple=8).hash
    (wider,) = picture_of(pipe, image=photo, outpaint=(0, 0, 16, 0), padding_mask_crop=8)
    assert wider.shape == (photo.shape[0], photo.shape[1] + 16, 3)
    assert np.array_equal(wider[:, :-16], photo)


def test_nine_channels_start_from_noise_alone(inpainter, photo, mask):
    """At strength 1, as diffusers does: the network reads the kept part beside x."""
    request = inpainter.request(PROMPT, **QUICK)
    batch = Batch(jobs_of(inpainter.model, request, canvas_of(inpainter.model, request, photo, mask)))
    (only,) = passes_of(batch, inpainter.painter, [])
    draw = keyed(batch.jobs, inpainter.model.codec.shape((64, 96)), inpainter.model.array)
    assert torch.equal(only.start(None, draw).x, draw("initial latents"))


def test_outpainting(pipe, photo):
    """More on each side, the middle unchanged."""
    picture = picture_of(pipe, image=photo, outpaint=(8, 16, 24, 3))[0]
    assert picture.shape == (64 + 19, 96 + 32, 3)
    np.testing.assert_array_equal(picture[16 : 16 + 64, 8 : 8 + 96], photo)
    around = np.ones(picture.shape[:2], bool)
    around[16 : 16 + 64, 8 : 8 + 96] = False
    edge = np.pad(photo, ((16, 3), (8, 24), (0, 0)), mode="edge")
    assert (picture[around] != edge[around]).any(-1).mean() > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_image": np.zeros((64, 96), np.uint8)}, "the mask has no white"),
        (
            {"mask_image": np.full((64, 64), 255, np.uint8)},
            "mask_image must have the size of the image: 64x64, the image is 96x64",
        ),
        ({"image": None, "mask_image": np.full((64, 96), 255, np.uint8)}, "require an image"),
        ({"image": None, "outpaint": (8, 8, 8, 8)}, "require an image"),
        ({"image": np.zeros((64, 96, 2))}, r"image must be a PIL image or uint8 \(H, W, 3\) \(got ndarray, float64"),
        ({"image": "photo.png"}, "image must be a PIL image"),
        ({"image": Image.new("F", (96, 64))}, "image: colour mode F"),
        ({"image": Image.new("RGB", (5000, 64))}, "width with its margins must be from 1 to 2048"),
        ({"image": Image.new("RGB", (96, 1))}, "the image has 96x1 pixels, less than 2. Enlarge it"),
        ({"outpaint": (1, 2, 3)}, r"outpaint must be \(left, top, right, bottom\) pixels"),
        ({"outpaint": (0, 0, 0, 4096)}, r"outpaint must be \(left, top, right, bottom\) pixels"),
        ({"hires_scale": 2.0}, "hires_scale has no effect with an image"),
        ({"width": 0}, "width must be a multiple of 2"),
        ({"width": 2**31}, "width must be a multiple of 2"),
        ({"image": [[1], [2, 3]]}, "image must be a PIL image or an array"),
        ({"mask_image": {}}, "mask_image must be"),
        ({"mask_image": Image.new("RGBA", (96, 64), (255, 255, 255, 0))}, "the mask has no white"),
    ],
)
def test_refused_pictures(pipe, photo, settings, message):
    with pytest.raises(ConfigError, match=message):
        picture_of(pipe, **{"image": photo} | settings)


def test_transparency_and_orientation(pipe):
    """As data sets have them: on white, upright."""
    image = Image.new("RGBA", (80, 64), (255, 0, 0, 0))
    np.testing.assert_array_equal(canvas(image, multiple=8).pixels, np.full((64, 80, 3), 255, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned_image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    turned_image.getexif().update(exif)
    assert canvas(turned_image, multiple=8).size == (96, 64)


def test_canvases_say_which_picture_they_were(photo, mask):
    made = canvas(photo, mask, multiple=8, margins=Margins(8), names=("a.png", None))
    assert made.record() == {"image": "a.png", "mask": None, "outpaint": (8, 0, 0, 0), "sha256": made.hash}
    others = [canvas(photo, multiple=8), canvas(photo, mask, multiple=8), canvas(photo[::-1], mask, multiple=8)]
    assert len({made.hash, *(other.hash for other in others)}) == 4


# two passes, variations, batches


def test_hires_is_two_passes(pipe, monkeypatch):
    """The second starts from the first's picture, enlarged; the steps of both are yielded and counted."""
    options = {"num_inference_steps": 10, "seed": 1, "hires_scale": 1.5, "hires_strength": 0.1}
    steps = list(pipe.stream(PROMPT, **options))
    assert [step.number for step in steps] == [*range(1, 11), 1]
    out = pipe(PROMPT, output_type="uint8", **options)
    assert out.images.shape == (1, 96, 96, 3)
    assert (out.metadata[0].width, out.metadata[0].steps) == (96, (10, 1))
    encoded = []
    encode = pixels.encode
    monkeypatch.setattr(pixels, "encode", lambda model, given, *_: (encoded.append(given), encode(model, given))[1])
    pipe(PROMPT, **options)
    plain = pipe(PROMPT, num_inference_steps=10, seed=1).images[0]
    np.testing.assert_array_equal(encoded[0][0], np.asarray(plain.resize((96, 96), Image.Resampling.LANCZOS)))
    with pytest.raises(ConfigError, match="height after hires_scale must be a multiple of 2 from 2 to 2048"):
        pipe(PROMPT, hires_scale=8.0, width=1024, height=1024)


def test_turned_noise():
    """Lengths are kept, a share of 0 and 1 are the ends, half way is as near to both."""
    a, b = (noise.normal((4, 16, 16), seed, "test") for seed in (1, 2))
    np.testing.assert_allclose(turned(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(turned(a, b, 1.0), b, atol=1e-6)
    half = turned(a, b, 0.5)
    assert np.linalg.norm(half - a) == pytest.approx(np.linalg.norm(half - b), rel=0.05)
    assert np.linalg.norm(half) == pytest.approx(np.linalg.norm(a), rel=0.05)
    np.testing.assert_array_equal(turned(a, a, 0.3), a)


def test_variations_of_one_picture(pipe):
    """Less strength is nearer to the seed's picture; strength 0 is that picture."""
    base = picture_of(pipe)
    none = picture_of(pipe, variation_seed=9, variation_strength=0.0)
    assert np.abs(none.astype(int) - base).max() <= 1
    small, large = (
        picture_of(pipe, variation_seed=9, variation_strength=share, num_images_per_prompt=2) for share in (0.1, 0.8)
    )
    for one in (0, 1):
        assert np.abs(small[one] - base[0].astype(int)).mean() < np.abs(large[one] - base[0].astype(int)).mean()
    assert (small[0] != small[1]).any()
    for alone in ({"variation_strength": 0.5}, {"variation_seed": 9}):
        with pytest.raises(ConfigError, match="a variation requires both"):
            picture_of(pipe, **alone)


def test_batches_are_of_what_is_alike(pipe, photo):
    """Other settings, sizes, pictures or lengths of prompts are other batches, in order."""
    plain = pipe.request(PROMPT, **QUICK, num_images=3, batch_size=2)
    long = pipe.request("red " * 50, seed=4)
    large = pipe.request(PROMPT, seed=5, width=96)
    given = pipe.request(PROMPT, seed=6)
    model = pipe.model
    jobs = [job for request in (plain, long, large) for job in jobs_of(model, request)]
    jobs += jobs_of(model, given, canvas_of(model, given, photo))
    assert [[job.seed for job in batch.jobs] for batch in batches_of(pipe.painter, jobs)] == [
        [1, 2],
        [3],
        [4],
        [5],
        [6],
    ]


def test_a_long_prompt_does_not_change_its_neighbours(pipe):
    """The picture of a short prompt is the same beside a long one."""
    alone = pipe(PROMPT, output_type="latent", **QUICK).images
    beside = pipe([PROMPT, "red " * 50], output_type="latent", **QUICK).images
    assert torch.equal(alone[0], beside[0])


def test_generators(pipe):
    """torch's, one for each picture or one for all; and not to be mistaken for a seed in the record."""
    seeded = partial(torch.Generator().manual_seed)
    out = pipe(PROMPT, num_images_per_prompt=2, generator=[seeded(1), torch.Generator().manual_seed(2)], **QUICK)
    assert out.metadata[0].own_noise
    first = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(2))
    same = pipe(PROMPT, latents=first[None], output_type="uint8", **QUICK).images[0]
    assert np.abs(np.asarray(out.images[1]).astype(int) - same).max() <= 1
    with pytest.raises(ConfigError, match="3 generators for 2 pictures"):
        pipe(PROMPT, num_images_per_prompt=2, generator=[seeded(1)] * 3, **QUICK)
    with pytest.raises(ConfigError, match=r"generator must be a torch.Generator"):
        pipe(PROMPT, generator=3, **QUICK)


def test_brackets_as_text(pipe):
    """Without weights they are what escaped ones are."""
    options = {"output_type": "latent", **QUICK}
    literal = pipe("a (red:1.5) ring", prompt_weights=False, **options).images
    assert torch.equal(literal, pipe(r"a \(red:1.5\) ring", **options).images)
    assert not torch.equal(literal, pipe("a (red:1.5) ring", **options).images)


# guidance


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 50.0, "guidance_rescale": 0.7},
        {"threshold": 0.9},
        {"apg": True, "apg_eta": 0.5, "apg_norm": 2.0, "apg_momentum": -0.5},
        {"pag_scale": 3.0},
        {"guidance_scale": 1.0, "pag_scale": 3.0},
        {"pag_scale": 2.0, "guidance_rescale": 0.5, "threshold": 0.99, "guidance_interval": (-3.0, 3.0)},
    ],
    ids=str,
)
def test_each_guidance_changes_the_picture_and_not_its_neighbours(pipe, settings):
    options = {"num_images_per_prompt": 2, "output_type": "latent", **QUICK, "guidance_scale": 4.0} | settings
    plain = pipe(PROMPT, output_type="latent", **QUICK, guidance_scale=options["guidance_scale"]).images
    together = pipe(PROMPT, **options).images
    alone = pipe(PROMPT, **options | {"num_images_per_prompt": 1, "seed": 2}).images
    assert torch.isfinite(together).all()
    assert (together[:1] - plain).abs().max() > 1e-4
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def one_step(tiny_model):
    """A function: the latents that one step with some settings ends at, from noise that is always the same.

    The first level of the tiny model's path is pure noise: there x0 is minus the network's v. Its attention to the
    prompt is made much stronger, so that guidance by it is seen.
    """
    own = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")
    for name, parameter in own.model.backbone.model.named_parameters():
        parameter.data.mul_(500 if "attn2.to_out" in name else 1)
    noise_ = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))

    def drawn(pipe=own, **settings):
        options = {"num_inference_steps": 1, "sampler": "ddim", "output_type": "latent", "guidance_scale": 1.0}
        return pipe(PROMPT, latents=noise_, **options | settings).images

    drawn.noise, drawn.pipe = noise_, own
    assert (drawn(guidance_scale=2.0) - drawn()).abs().max() > 0.05
    return drawn


def test_rescaled_guidance_by_hand(one_step):
    cond, guided = one_step(), one_step(guidance_scale=9.0)
    expected = guided * (0.7 * cond.std(unbiased=False) / guided.std(unbiased=False) + 0.3)
    torch.testing.assert_close(one_step(guidance_scale=9.0, guidance_rescale=0.7), expected, rtol=1e-4, atol=1e-5)


def test_thresholded_guidance_by_hand(one_step):
    cond, guided = one_step(), one_step(guidance_scale=90.0)
    place = round(0.9 * (cond.numel() - 1))
    limit, actual = (each.abs().flatten().sort().values[place] for each in (cond, guided))
    assert actual > limit
    expected = guided.clip(-actual, actual) * limit / actual
    torch.testing.assert_close(one_step(guidance_scale=90.0, threshold=0.9), expected, rtol=1e-4, atol=1e-5)


def test_projected_guidance_by_hand(one_step):
    """Of two steps the second adds the first one's difference times the momentum."""
    cond = one_step()
    difference = one_step(guidance_scale=2.0) - cond  # uncond + 2 (cond - uncond) - cond
    most = float(difference.norm()) / 2
    difference = difference / 2
    parallel = (difference * cond).sum() / cond.norm() ** 2 * cond
    expected = cond + 4.0 * (difference - parallel + 0.5 * parallel)
    out = one_step(guidance_scale=5.0, apg=True, apg_eta=0.5, apg_norm=most)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one_step(guidance_scale=5.0, apg=True, apg_eta=1.0), one_step(guidance_scale=5.0))
    twice = {"guidance_scale": 5.0, "apg": True, "num_inference_steps": 2}
    assert (one_step(apg_momentum=-0.5, **twice) - one_step(**twice)).abs().max() > 1e-3


@torch.no_grad()
def test_perturbed_guidance_by_hand(one_step):
    """Away from what the network says with perturbed attention."""
    pipe = one_step.pipe
    conditions = stacked([pipe.model.encoder.encode(Prompt(PROMPT))])
    level = pipe.model.path.numbered(pipe.model.path.T - 1)
    assert level.alpha == 0
    perturbed = -pipe.model.backbone.predict_perturbed(one_step.noise, level.t, conditions)
    expected = one_step() + 3.0 * (one_step() - perturbed)
    torch.testing.assert_close(one_step(pag_scale=3.0), expected, rtol=1e-4, atol=1e-5)
    assert (expected - one_step()).abs().max() > 1e-3


def test_guidance_in_an_interval(one_step, monkeypatch):
    """Both conditions are computed at the levels in the interval, and one at the others. Pure noise is in none."""
    pipe = one_step.pipe
    levels = pipe.model.path.levels(4, pipe.request(PROMPT).spacing)
    between = (levels[1].log_snr + levels[2].log_snr) / 2
    counts, predict = [], pipe.model.backbone.predict
    noted = lambda x, time, conditions: counts.append(conditions.count) or predict(x, time, conditions)  # noqa: E731
    monkeypatch.setattr(pipe.model.backbone, "predict", noted)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0}
    early = one_step(**options, guidance_interval=(-100.0, between))
    late = one_step(**options, guidance_interval=(between, 100.0))
    assert counts == [0, 2, 0, 0, 0, 0, 2, 2]  # 0: without an axis of conditions
    assert (early - late).abs().max() > 1e-3


def test_guidance_by_clip_by_hand(tiny_model, one_step):
    """x0 moves along the gradient of CLIP's score, by at most 0.05 root mean square."""
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")
    pipe.load_clip()
    x0 = one_step(pipe=pipe)
    gradient = pipe.painter.scorer.gradient([PROMPT], partial(differentiable_decode, pipe.model))(x0)
    most = 0.05 * x0.numel() ** 0.5
    for scale in (0.5 * most / float(gradient.norm()), 2 * most / float(gradient.norm())):
        change = scale * gradient * min(1.0, most / float(scale * gradient.norm()))
        out = one_step(pipe=pipe, clip_guidance_scale=scale)
        torch.testing.assert_close(out, x0 + change, rtol=1e-3, atol=1e-4)
    assert change.norm() == pytest.approx(most, rel=1e-4)


@torch.no_grad()
def test_perturbed_attention_is_the_identity(pipe):
    """With the middle block's self-attention maps set to the identity by hand: values, projected."""
    x, context = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)), torch.randn(2, 5, 32)
    context = torch.randn(2, 32, pipe.model.backbone.model.config.cross_attention_dim)
    conditions = Conditions({"tokens": context})
    result = pipe.model.backbone.predict_perturbed(x, 10.0, conditions)
    attentions = [
        module
        for name, module in pipe.model.backbone.model.named_modules()
        if name.startswith("mid_block") and name.endswith("attn1")
    ]
    assert attentions
    before = [module.forward for module in attentions]
    for module in attentions:
        module.forward = lambda hidden, *_, module=module, **__: module.to_out[0](module.to_v(hidden))
    try:
        expected = pipe.model.backbone(x, 10.0, conditions)
    finally:
        for module, forward in zip(attentions, before, strict=True):
            module.forward = forward
    assert torch.equal(result, expected)
    assert not torch.equal(pipe.model.backbone(x, 10.0, conditions), expected), (
        "and afterwards attention is its own again"
    )


def test_autoguidance(tiny_model, one_step):
    """By itself it changes nothing; away from one that says zero is a multiple."""
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")
    with pytest.raises(ConfigError, match="autoguidance_scale requires a weaker model"):
        picture_of(pipe, autoguidance_scale=2.0)
    pipe.load_weaker(tiny_model)
    plain, guided = (
        pipe(PROMPT, output_type="latent", guidance_scale=1.0, autoguidance_scale=scale, **QUICK).images
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(plain, guided, rtol=1e-3, atol=1e-3)
    for parameter in pipe.painter.weaker.backbone.model.conv_out.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(one_step(pipe=pipe, autoguidance_scale=3.0), 3 * one_step(pipe=pipe))
    assert "weaker" in pipe.painter.sources


def test_the_gradient_of_clip_is_that_of_its_score(pipe):
    """Against finite differences of temperature times cosine, along a random direction."""
    pipe.load_clip()
    scorer = pipe.painter.scorer
    temperature = float(scorer.clip.towers.logit_scale.exp())
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    towards = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    gradient = scorer.gradient([PROMPT, "a green star"], partial(differentiable_decode, pipe.model))(latents)

    def score(step):
        with torch.no_grad():
            images = differentiable_decode(pipe.model, latents + step * towards)
            return temperature * scorer.score([PROMPT, "a green star"], images).double()

    slope = (score(1e-2) - score(-1e-2)) / 2e-2
    torch.testing.assert_close((gradient * towards).sum((1, 2, 3)).double(), slope, rtol=0.02, atol=1e-3)
    assert not gradient.requires_grad


def test_clip_of_ones_own(pipe, tmp_path):
    """A whole model in open_clip's format scores as open_clip itself does."""
    import json

    import open_clip
    from safetensors.torch import save_file

    from latentdiff.families.clip import load_scorer

    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    }
    settings["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**settings).eval()
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.26, 0.27]}
    config = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    prompts = ["a red circle", "blue"]
    transform = open_clip.image_transform(32, is_train=False, **preprocess)
    with torch.no_grad():
        images = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
        ids = open_clip.SimpleTokenizer(context_length=77)(prompts)
        expected = (theirs.encode_image(images, True) * theirs.encode_text(ids, True)).sum(-1)
    from latentdiff.core.images import to_images

    result = load_scorer(tmp_path).score(prompts, to_images(pictures))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(load_scorer(tmp_path).clip, Clip)


def test_a_model_without_clip_says_so(tmp_path):
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "model")
    other = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(ConfigError, match="has no CLIP of its own"):
        other(PROMPT, clip_guidance_scale=1.0)


# memory


@pytest.mark.parametrize("unit", ["network", "layers", "blocks"])
def test_offloaded_networks_draw_the_same(tiny_model, pipe, unit):
    """The CPU stands for the device: hooks move networks, layers or blocks, and change no bit."""
    units = {} if unit == "network" else {unit: True}
    other = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu").offload("cpu", **units)
    if unit == "layers":
        assert next(other.model.backbone.parameters()).device.type == "meta"
    settings = {"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.9}
    np.testing.assert_array_equal(picture_of(other), picture_of(pipe))
    np.testing.assert_array_equal(picture_of(other, **settings), picture_of(pipe, **settings))


@pytest.mark.parametrize("pieces", [{"vae_tiling": True}, {"vae_slicing": True}])
def test_in_pieces(pipe, pieces):
    """Slices are the same picture, and so are tiles where a picture is no larger than one."""
    whole, again = (picture_of(pipe, num_images_per_prompt=2, **more) for more in ({}, pieces))
    assert np.abs(whole.astype(int) - again).max() <= 1


def test_tiles_of_a_large_picture(pipe, monkeypatch):
    """Blended where they overlap: near to the whole, and it is tiles that are decoded."""
    vae = pipe.model.codec.vae
    monkeypatch.setattr(vae, "tile_sample_min_size", 64)
    monkeypatch.setattr(vae, "tile_latent_min_size", 32)
    whole, tiled = (picture_of(pipe, width=128, height=128, vae_tiling=tiling).astype(int) for tiling in (False, True))
    assert 0 < np.abs(whole - tiled).mean() < 8


def test_a_half_precision_autoencoder_that_overflows(tiny_model):
    """NaN in float16: a warning, and again in float32; the weights return to float16 with the same bits."""
    other = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", torch_dtype=torch.bfloat16)
    other.model.codec.to(torch.float16)
    vae = other.model.codec.vae
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(300.0)
        vae.decoder.conv_in.bias.mul_(300.0)
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(200.0)
        vae.decoder.conv_norm_out.weight.mul_(60_000.0)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    out = other(PROMPT, output_type="pt", **QUICK)
    assert torch.isfinite(out.images).all()
    assert out.notes == ["the autoencoder gave non-finite numbers in float16; decoded in float32 instead"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"decoding gave non-finite numbers \(seeds \[1\]\)"):
        other(PROMPT, **QUICK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(tiny_model, pipe, dtype):
    other = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", torch_dtype=dtype)
    assert np.abs(picture_of(other).astype(int) - picture_of(pipe)).mean() < 6


def test_jobs_count_seeds_on(pipe):
    request = pipe.request(PROMPT, seed=5, num_images=3)
    jobs = jobs_of(pipe.model, request)
    assert [job.seed for job in jobs] == [5, 6, 7]
    other = pipe.request("other", seed=9)
    assert jobs[1].settings == Job(other, 0, plan(other, pipe.model)).settings


@torch.no_grad()
def test_deep_features_are_the_network_s_own(folders):
    """Given its own deep features the finest level gives the same output, to the bit; given others, another."""
    unet = load_unet(folders["XL"])
    generator = torch.Generator().manual_seed(0)
    x, conditions = (
        torch.randn(2, 4, 8, 8, generator=generator),
        Conditions(
            {
                "tokens": torch.randn(2, 77, unet.spec.reads["tokens"][-1], generator=generator),
                "pooled": torch.randn(2, 128, generator=generator),
                "sizes": torch.full((2, 6), 64.0),
            }
        ),
    )
    plain = unet.predict(x, 500.0, conditions)
    full, deep = unet.predict_from(x, 500.0, conditions, None)
    assert torch.equal(full, plain)
    ran = []
    below = [*unet.model.down_blocks[1:], unet.model.mid_block, *unet.model.up_blocks[:-1]]
    handles = [m.register_forward_hook(lambda module, *_: ran.append(module)) for b in below for m in b.resnets]
    again, same = unet.predict_from(x, 500.0, conditions, deep)
    assert torch.equal(again, plain)
    assert same is deep
    assert not ran, "nothing below is computed"
    for handle in handles:
        handle.remove()
    assert not torch.equal(unet.predict_from(x, 500.0, conditions, deep * 1.5)[0], plain)
    assert torch.equal(unet.predict(x, 500.0, conditions), plain), "the blocks are as they were"


def test_every_so_many_evaluations(pipe, monkeypatch):
    """With an interval of 3, steps 1, 4 and 7 compute all; pairs and single evaluations are counted apart."""
    full = []
    inner = type(pipe.model.backbone).predict_from
    monkeypatch.setattr(
        type(pipe.model.backbone),
        "predict_from",
        lambda self, x, t, c, deep: full.append(deep is None) or inner(self, x, t, c, deep),
    )
    settings = {"seed": 1, "num_inference_steps": 7, "guidance_scale": 3.0, "output_type": "latent"}
    plain = pipe(PROMPT, **settings).images
    assert not full
    near = pipe(PROMPT, cache_interval=3, **settings).images
    assert full == [True, False, False, True, False, False, True]
    assert 0 < (near - plain).abs().mean() < plain.abs().mean()
    full.clear()
    pipe(PROMPT, cache_interval=2, guidance_interval=(-1.0, 1.0), **settings)
    assert sum(full) >= 3
    with pytest.raises(ConfigError, match="cache_interval: must be at least 1"):
        pipe.request(PROMPT, cache_interval=0)
