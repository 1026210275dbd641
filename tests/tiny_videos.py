"""Videos of a few frames that tests encode themselves; frame i is gray, i * STEP bright."""

import io

import numpy as np
from PIL import Image

STEP = 8


def gray(number: int, width: int = 48, height: int = 32) -> np.ndarray:
    return np.full((height, width, 3), number * STEP % 256, np.uint8)


def video(frames: int = 24, rate: int = 8, kind: str = "mp4", *, gop: int = 6, size=(48, 32)):
    """Returns the bytes of a video file."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray(i, *size), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def gif(frames: int = 24, milliseconds: int = 100) -> bytes:
    """Returns the bytes of a GIF."""
    file = io.BytesIO()
    first, *rest = [Image.fromarray(gray(i)) for i in range(frames)]
    first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds)
    return file.getvalue()


def numbers(images) -> list[int]:
    """Returns which frames pictures are: uint8[..., 3] arrays or Pillow images."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]
