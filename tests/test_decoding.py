"""Pixels of every kind of picture against values computed here, and what is refused."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from latentdiff.core.decoding import decode, silent_decoders
from latentdiff.core.errors import DataError

from .pictures import encoded, png

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)


def composited(color, alpha, background=(255, 255, 255)):
    """alpha c + (1 - alpha) background, to the nearest whole value."""
    exact = (alpha / 255.0) * color + (1 - alpha / 255.0) * np.array(background)
    return np.floor(exact + 127 / 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "webp", "ppm"])
def test_colour_as_it_is(kind):
    decoded = decode(encoded(Image.fromarray(COLOR), kind, **({"lossless": True} if kind == "webp" else {})))
    assert np.array_equal(decoded.pixels, COLOR)
    assert (decoded.mode, decoded.is_animated) == ("RGB", False)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparency_is_composited(background):
    """Hidden colour stays hidden: where alpha is 0 there is nothing but background."""
    alpha = ALPHA.copy()
    alpha[0] = 0
    rgba = Image.fromarray(np.concatenate([COLOR, alpha], -1))
    result = decode(encoded(rgba), background).pixels
    assert np.array_equal(result, composited(COLOR, alpha, background))
    assert np.array_equal(result[0], np.broadcast_to(np.array(background), (7, 3)))
    grey = COLOR[..., :1]
    la = Image.fromarray(np.concatenate([grey, alpha], -1), "LA")
    assert np.array_equal(decode(encoded(la), background).pixels, composited(grey.repeat(3, -1), alpha, background))


def test_palettes():
    """Indices looked up; an index that is marked transparent is background."""
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indices = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    assert np.array_equal(decode(encoded(image)).pixels, palette[indices])
    expected = np.where((indices == indices[0, 0])[..., None], 255, palette[indices])
    one = decode(encoded(image, transparency=int(indices[0, 0])))
    assert one.mode == "P"
    assert np.array_equal(one.pixels, expected)
    alphas = RNG.integers(0, 256, 256, dtype=np.uint8)
    many = decode(encoded(image, transparency=alphas.tobytes())).pixels
    assert np.array_equal(many, composited(palette[indices], alphas[indices][..., None]))


def test_key_colours():
    """tRNS of grey and colour pictures, of 8 and of 16 bits."""
    grey = COLOR[..., :1]
    result = decode(png(grey, 8, 0, extra=bytes([0, grey[2, 3, 0]]))).pixels
    assert np.array_equal(result, np.where(grey == grey[2, 3], 255, grey).repeat(3, -1))
    key = b"".join(bytes([0, value]) for value in COLOR[1, 2])
    expected = np.where((COLOR[1, 2] == COLOR).all(-1, keepdims=True), 255, COLOR)
    assert np.array_equal(decode(png(COLOR, 8, 2, extra=key)).pixels, expected)
    deep = RNG.integers(0, 65536, (5, 7, 1), dtype=np.uint16)
    result = decode(png(deep, 16, 0, extra=deep[2, 3].astype(">u2").tobytes()), (0, 0, 0)).pixels
    assert np.array_equal(result, np.where(deep == deep[2, 3], 0, np.rint(deep / 257)).repeat(3, -1))


def test_one_bit_and_grey():
    bits = RNG.random((5, 7)) > 0.5
    assert np.array_equal(decode(encoded(Image.fromarray(bits))).pixels, bits[..., None].repeat(3, -1) * np.uint8(255))
    assert np.array_equal(decode(encoded(Image.fromarray(COLOR[..., 0]))).pixels, COLOR[..., :1].repeat(3, -1))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_of_grey_are_scaled(kind):
    """Pillow's own conversion clips nearly all of them to white."""
    values = RNG.integers(0, 65536, (50, 70), dtype=np.uint16)
    decoded = decode(encoded(Image.fromarray(values), kind))
    assert decoded.mode.startswith("I;16")
    assert np.array_equal(decoded.pixels, np.rint(values / 257)[..., None].repeat(3, -1))
    assert abs(decoded.pixels.mean() / 255 - values.mean() / 65535) < 1 / 255


def test_sixteen_bits_of_colour_keep_their_high_byte():
    values = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    assert np.array_equal(decode(png(values, 16, 2)).pixels, values >> 8)
    deep = RNG.integers(0, 65536, (5, 7, 4), dtype=np.uint16)
    high = (deep >> 8).astype(np.uint8)
    assert np.array_equal(decode(png(deep, 16, 6)).pixels, composited(high[..., :3], high[..., 3:]))


def test_cmyk():
    """(1 - C)(1 - K) of each ink, to one step."""
    inks = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    decoded = decode(encoded(Image.fromarray(inks, "CMYK"), "tiff"))
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert decoded.mode == "CMYK"
    assert np.abs(decoded.pixels - expected).max() <= 1


def test_exif_turns_upright():
    """Each of the eight orientations brings the same picture."""
    turned = {
        1: COLOR,
        2: COLOR[:, ::-1],
        3: COLOR[::-1, ::-1],
        4: COLOR[::-1],
        5: COLOR.transpose(1, 0, 2),
        6: COLOR.transpose(1, 0, 2)[::-1],
        7: COLOR.transpose(1, 0, 2)[::-1, ::-1],
        8: COLOR.transpose(1, 0, 2)[:, ::-1],
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        assert np.array_equal(decode(data).pixels, COLOR), orientation


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue", "white")]
    options = {"lossless": True} if kind == "webp" else {}
    decoded = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert decoded.is_animated
    assert np.array_equal(decoded.pixels, np.broadcast_to(np.uint8([255, 0, 0]), (6, 8, 3)))


def test_what_cannot_be_shown_faithfully_is_refused():
    with pytest.raises(DataError, match="colour mode F"):
        decode(encoded(Image.fromarray(RNG.random((5, 7), dtype=np.float32)), "tiff"))
    with pytest.raises(DataError, match="colour mode I "):
        decode(encoded(Image.fromarray(RNG.integers(0, 2**31, (5, 7), dtype=np.int32)), "tiff"))


def jpeg(side=64):
    noise = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "jpg", quality=95)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (jpeg()[:-200], "truncated"),
        (jpeg()[:300], "truncated"),
        (encoded(Image.fromarray(COLOR))[:-30], "truncated|broken"),
        (b"<html><body>404</body></html>", 'not an image: starts with "<html>"'),
        (b"\n<!DOCTYPE html>", 'not an image: starts with "<!DOCTYPE>"'),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "only a pointer of Git LFS: git lfs pull"),
        (b"PK\x03\x04 a zip", "not an image: starts with 50 4b 03 04"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image"),
        (png(np.zeros((1, 20, 3), np.uint8), 8, 2), "20 x 1 is longer than 16 to 1"),
    ],
)
def test_why_a_file_cannot_be_read(data, reason):
    with pytest.raises(DataError, match=f"^{reason}"):
        decode(data)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    """A bomb: a few kilobytes that ask for gigabytes."""
    with pytest.raises(DataError, match=r"^40 x 30 are more than 1,000 pixels"):
        decode(encoded(Image.new("RGB", (40, 30))), max_pixels=1000)
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "png")
    with silent_decoders(), pytest.raises(DataError, match=r"too many pixels|are more than"):
        decode(bomb.getvalue())


def test_decoders_do_not_warn():
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        with silent_decoders():
            decode(encoded(Image.new("1", (10_000, 9_000))), max_pixels=89_000_000_0)
    assert not messages
