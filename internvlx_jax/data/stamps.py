"""Whether image files are still those that were measured: their size and time (design: data.md 10).

A stamp costs one look at the file system per image and reads nothing.
"""

from __future__ import annotations

import hashlib
import os

from internvlx_jax.data import storage
from internvlx_jax.data.conversations import ChatSample

NONE = 0  # no local file: embedded images, URLs, texts
MISSING = -1  # at least one file does not exist


def stamp_of(sample: ChatSample) -> int:
    """Returns a number that changes when an image of a sample is replaced; NONE or MISSING."""
    paths = [image for image in sample.images if isinstance(image, str)]
    if isinstance(sample.video, str):
        paths.append(sample.video)  # the folder changes when a frame comes or goes
    seen = []
    for path in paths:
        if storage.is_url(path):
            continue
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return MISSING
        seen.append((status.st_size, status.st_mtime_ns))
    if not seen:
        return NONE
    digest = hashlib.blake2b(repr(seen).encode(), digest_size=8).digest()
    return max(1, int.from_bytes(digest, "big") >> 1)
