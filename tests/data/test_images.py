"""One crafted file for each row of the decoding table (design: data.md 7)."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.images import image_size, load_image


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_alpha_is_dropped_not_composited(tmp_path):
    rgba = noise(9, 11, 4)
    rgba[:, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.info == {"counted": ()}
    assert np.array_equal(np.asarray(image), rgba[:, :, :3])


def test_gray_and_one_bit(tmp_path):
    gray = noise(5, 7)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(
        np.asarray(load_image(tmp_path / "gray.png")), np.repeat(gray[..., None], 3, axis=2)
    )
    Image.fromarray(gray > 127).save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(load_image(tmp_path / "bits.png")))) == {0, 255}


def test_cmyk_by_pillows_formula(tmp_path):
    Image.frombytes("CMYK", (6, 6), noise(6, 6, 4).tobytes()).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif")), expected)


def test_palette_with_transparency_is_expanded(tmp_path):
    image = Image.frombytes("P", (8, 8), (noise(8, 8) % 4).tobytes())
    colors = noise(4, 3)
    image.putpalette(colors.tobytes())
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255, 10]))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), colors[noise(8, 8) % 4])


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 3), color) for color in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((1, 1)) == (250, 0, 0)


@pytest.mark.parametrize("suffix, byte_order", [("png", "<"), ("tif", "<"), ("tif", ">")])
def test_16_bit_values_are_shifted(tmp_path, suffix, byte_order):
    values = np.array([[0, 255, 256], [4096, 40000, 65535]], byte_order + "u2")
    path = tmp_path / f"a.{suffix}"
    mode = "I;16" if byte_order == "<" else "I;16B"
    Image.frombytes(mode, (3, 2), values.tobytes()).save(path)
    image = load_image(path)
    assert np.asarray(image)[..., 0].tolist() == [[0, 0, 1], [16, 156, 255]]
    assert image.info == {"counted": ("16bit",)}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_bad(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    assert image_size(tmp_path / "a.tif") == (4, 4)
    with pytest.raises(SampleError, match=f'a.tif: image mode "{mode}" has no') as error:
        load_image(tmp_path / "a.tif")
    assert error.value.reason == "unsupported_mode"


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size == (30, 20)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files_are_decoded_as_far_as_they_go(tmp_path, suffix):
    pixels = np.asarray(Image.fromarray(noise(8, 8, 3)).resize((256, 256)))
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(pixels).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    image = load_image(cut)
    assert image.info == {"counted": ("truncated",)} and image.size == image_size(cut) == (256, 256)
    intact, damaged = np.asarray(load_image(whole)), np.asarray(image)
    assert np.array_equal(intact[:64], damaged[:64]) and not np.array_equal(intact[-1], damaged[-1])


def test_pillow_globals_are_restored_and_threads_agree(tmp_path):
    pixels = np.asarray(Image.fromarray(noise(8, 8, 3)).resize((200, 200)))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes(content.getvalue()[: None if i % 2 else -1500])
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: load_image(tmp_path / f"{i}.png"), range(24)))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for i, image in enumerate(images):
        assert image.info["counted"] == (() if i % 2 else ("truncated",))
        assert np.array_equal(np.asarray(image), np.asarray(images[i % 2]))
    assert np.array_equal(np.asarray(images[1]), pixels)


@pytest.mark.parametrize("side", [10_000, 30_000])  # above Pillow's warning, above its error
def test_pixel_limit_is_known_from_the_header(tmp_path, side):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(side, side))
    assert image_size(path) == (side, side)
    with pytest.raises(
        SampleError, match=f"{side} x {side} pixels are more than max_pixels = 9999"
    ) as error:
        load_image(path, max_pixels=99_999_999)
    assert error.value.reason == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS is not None


def test_default_pixel_limit(tmp_path):
    (tmp_path / "a.png").write_bytes(
        png_header(13_378, 13_377)
    )  # the first of its kind above 178,956,970
    with pytest.raises(SampleError, match="max_pixels = 178956970"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_missing_and_foreign_files(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    for read in (image_size, load_image):
        with pytest.raises(
            SampleError, match=r"a\.png: the image cannot be read \(.*\)\.\nCheck"
        ) as error:
            read(path)
        assert error.value.reason == "unreadable"


def test_folder_is_unreadable(tmp_path):
    with pytest.raises(SampleError, match="IsADirectoryError"):
        load_image(tmp_path)
