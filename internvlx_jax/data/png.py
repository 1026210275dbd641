"""What a PNG file says beside its pixels, found without decoding them (design: data.md 7)."""

from __future__ import annotations

import struct
import zlib
from typing import IO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_LARGEST = 2**20  # bytes of a chunk that is looked at


def png_metadata(file: IO[bytes]) -> bytes:
    """Returns a PNG of one pixel with the EXIF and text chunks of a file, wherever they stand.

    Pixel data are skipped, not read; a file that ends early gives what came before.

    Args:
        file: an open PNG file; its position is kept.
    """
    place = file.tell()
    try:
        file.seek(0)
        found = []
        if file.read(len(_SIGNATURE)) == _SIGNATURE:
            while len(head := file.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                if kind in _METADATA and length <= _LARGEST:
                    found.append(_chunk(kind, file.read(length)))
                    file.seek(4, 1)
                elif kind == b"IEND":
                    break
                else:
                    file.seek(length + 4, 1)
    finally:
        file.seek(place)
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(b"\0\0"))
    parts = (_SIGNATURE, _chunk(b"IHDR", header), *found, pixels, _chunk(b"IEND", b""))
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
