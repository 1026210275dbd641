"""Every kind of image gives the same tiles; what is not one is named."""

import base64
import contextlib
import http.server
import io
import threading
import urllib.parse
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.inference.batches import cut_images
from internvlx_jax.inference.images import ImageBytes, image_sources
from internvlx_jax.inference.requests import Tiler

TILER = Tiler(TileConfig(tile_size=56, max_num=4))


def cut(images, **options) -> list[np.ndarray]:
    return cut_images(TILER, image_sources(images, **options), "here")


@pytest.fixture(scope="module")
def server(image):
    """URL of a server on this machine that has the page, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/page.png" else 404)
            self.end_headers()
            if self.path == "/page.png":
                self.wfile.write(Path(image).read_bytes())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("read_files", [False, True])
def test_all_kinds_of_images_are_the_same(image, pixels, server, read_files):
    data = Path(image).read_bytes()
    with fsspec.open("memory://pages/page.png", "wb") as file:
        file.write(data)
    kinds = [
        image,
        Path(image),
        data,
        Image.open(image),
        Image.fromarray(pixels),
        pixels,
        pixels[:, ::-1][:, ::-1],
        ImageBytes("page", data),
        f"{server}/page.png",
        "memory://pages/page.png",
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        f"data:image/png,{urllib.parse.quote_from_bytes(data)}",
    ]
    (expected,) = cut(image)
    assert expected.shape == (3, 56, 56, 3)
    for kind in kinds:
        (tiles,) = cut(kind, read_files=read_files)
        np.testing.assert_array_equal(tiles, expected, err_msg=str(type(kind)))


def test_one_several_and_no_images(image, pixels):
    assert image_sources(None) == image_sources([]) == ()
    assert image_sources(image) == image_sources([image]) == (image,)
    assert len(image_sources((image, pixels))) == 2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_pillow_images_of_any_mode_are_read_as_their_files_are(pixels, mode):
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    sixteen = pytest.warns(UserWarning, match="16-bit")
    context = sixteen if mode == "I;16" else contextlib.nullcontext()
    with context:
        (expected,) = cut(file.getvalue())
        (tiles,) = cut(image)
    np.testing.assert_array_equal(tiles, expected)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (7, TypeError, "images is a int; give a path, a URL, the bytes"),
        ([None], TypeError, r"images\[0\] is a NoneType; give"),
        (
            np.zeros((4, 4), np.uint8),
            ValueError,
            r"uint8\[4, 4\]; give RGB pixels as uint8\[H, W, 3\]",
        ),
        (np.zeros((4, 4, 3)), ValueError, r"float64\[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"\[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\[0, 4, 3\]"),
        (Image.new("F", (4, 4)), ValueError, 'the mode "F"'),
        ("gone.png", SampleError, "gone.png: the image cannot be read"),
        ("data:image/png;base64,!", SampleError, "images: the data: URL is not well formed"),
        ("data:image/png", SampleError, "no comma"),
        (b"no image", SampleError, "images .bytes.: the image cannot be read"),
        ("nosuch://a/b.png", ValueError, "nosuch"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        cut(wrong)


def test_a_url_without_a_file_is_named(server):
    with pytest.raises(SampleError, match=f"{server}/gone.png: .*404"):
        image_sources(f"{server}/gone.png")
