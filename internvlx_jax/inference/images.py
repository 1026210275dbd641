"""Accepts images in every form that a caller may have."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data import storage
from internvlx_jax.data.images import (
    ImageBytes,
    ImageSource,
    StoredImage,
    embedded_image,
    unreadable,
)

# A path or URL, an encoded file, an image stored in another file, a Pillow image, or pixels
# uint8[H, W, 3].
ImageLike = ImageSource | Image.Image | np.ndarray
Images = ImageLike | Sequence[ImageLike] | None

ACCEPTED = (
    "give a path, a URL, the bytes of an image file, a PIL image or a NumPy array uint8[H, W, 3]"
)
URL_SECONDS = 30


def image_sources(images: Images, *, read_files: bool = False) -> tuple[ImageSource, ...]:
    """Returns the sources of one image, of several or of none, in order.

    Args:
        images: what the caller gave.
        read_files: whether files are read here, so that later changes of them have no effect.
            Otherwise only http(s) URLs are, and files are opened when their batch is prepared.

    Raises:
        TypeError: an image has a type that is not accepted.
        ValueError: an array has another shape or dtype than uint8[H, W, 3].
        SampleError: a file or URL cannot be read.
    """
    if images is None:
        return ()
    if isinstance(images, (list, tuple)):
        named = [(image, f"images[{i}]") for i, image in enumerate(images)]
        return tuple(_source(image, name, read_files) for image, name in named)
    return (_source(images, "images", read_files),)


def _source(image: object, name: str, read_files: bool) -> ImageSource:
    if isinstance(image, bytes):
        return ImageBytes(f"{name} (bytes)", image)
    if isinstance(image, Image.Image):
        return _encoded(image, f"{name} ({type(image).__name__})")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"{name} is an array {image.dtype}{list(image.shape)}; give RGB pixels as "
                "uint8[H, W, 3]"
            )
        return _encoded(Image.fromarray(np.ascontiguousarray(image)), f"{name} (array)")
    if isinstance(image, str):
        try:
            data = embedded_image(image)
        except SampleError as error:
            raise error.at(name) from None
        if data is not None:
            kind = "data: URL" if image.lstrip().lower().startswith("data:") else "base64"
            return ImageBytes(f"{name} ({kind})", data)
    if isinstance(image, (str, os.PathLike)):
        return _file(os.fspath(image), read_files)
    if hasattr(image, "open"):
        return cast(StoredImage, image)
    raise TypeError(f"{name} is a {type(image).__name__}; {ACCEPTED}")


def _encoded(image: Image.Image, name: str) -> ImageBytes:
    """Encodes a decoded image without loss, so that every kind of image takes the same way."""
    if image.mode in ("I", "F"):
        raise ValueError(
            f'{name} has the mode "{image.mode}", which has no defined range of values; convert it '
            "to 8-bit RGB"
        )
    file = io.BytesIO()
    try:
        if image.mode.startswith("I;16"):  # keeps 16-bit values, which files have too
            image.save(file, "PNG", compress_level=1)
        else:
            copy = image.copy()
            copy.info.pop("transparency", None)  # alpha is dropped, as it is for files
            copy.convert("RGB").save(file, "PPM")
    except OSError as error:  # a lazily opened file that is damaged
        raise unreadable(name, error) from error
    return ImageBytes(name, file.getvalue())


def _file(path: str, read_files: bool) -> ImageSource:
    """Returns a file or URL as it is, or its bytes. http(s) URLs are fetched once, with urllib."""
    try:
        if path.startswith(("http://", "https://")):
            request = urllib.request.Request(path, headers={"User-Agent": "internvlx-jax"})
            with urllib.request.urlopen(request, timeout=URL_SECONDS) as response:
                return ImageBytes(path, response.read())
        if not (read_files or storage.is_url(path)):
            os.stat(path)  # a missing file is reported before anything is computed
        if not read_files:
            return path
        with storage.open_binary(path) as file:
            return ImageBytes(path, file.read())
    except ConfigError:  # a URL whose package is missing; the message names it
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
