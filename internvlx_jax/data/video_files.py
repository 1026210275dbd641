"""Video files and GIFs -> RGB frames, by number (design: data.md 3).

PyAV decodes video files, Pillow GIFs. A frame is found by its time, number / rate, which is exact
for a constant rate, so that a frame far into a file does not cost the decoding of all before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from internvlx_jax.core.data_config import MAX_PIXELS
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.extras import require
from internvlx_jax.core.json_text import shorten
from internvlx_jax.core.remote import StorageError
from internvlx_jax.data.images import (
    ImageBytes,
    ImageSource,
    check_pixels,
    open_image,
    pillow_globals,
)

_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv")
VIDEO_ENDINGS = (*_ENDINGS, ".ts", ".3gp", ".ogv", ".gif")
# Containers of one file. Others, such as playlists, name further files and addresses to open.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
_NEAR = 250  # frames; nearer ones are reached by decoding, others by seeking
_GIF_RATE = 10.0  # frames per second of a GIF that does not say

# Maps (number of frames, frames per second) to the numbers of the frames to take.
Choose = Callable[[int, float], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """Bounds what one video may cost.

    Attributes:
        max_pixels: frames with more pixels are refused.
        seconds: longest time for its decoding; None does not look at the clock, so that the result
            is the same on every machine.
    """

    max_pixels: int = MAX_PIXELS
    seconds: float | None = None


class OneTile:
    """Marks sources of images that are one tile, whatever their size: frames of videos."""


class VideoFrame(ImageBytes, OneTile):
    """An encoded frame of a video in memory."""


class Frames(NamedTuple):
    """Frames of a video.

    Attributes:
        images: RGB images.
        damaged: whether the file ends early or breaks off, so that the last frame that could be
            decoded stands for later ones.
    """

    images: list[Image.Image]
    damaged: bool


def is_video_file(path: str) -> bool:
    """Returns whether a path is named like a video file or a GIF."""
    return path.lower().endswith(VIDEO_ENDINGS)


def check_video(source: ImageSource, limits: VideoLimits = VideoLimits()) -> None:
    """Looks whether a file is a video that can be decoded, from its header.

    Raises:
        SampleError: "unreadable", "too_many_pixels", or "missing_decoder".
    """
    with _explained(source), open_image(source) as file:
        if _is_gif(file):
            with _open_gif(file) as image:
                check_pixels(image.size, limits.max_pixels, source)
            return
        with _opened(file, limits, source):
            pass


def decode_frames(
    source: ImageSource, choose: Choose, limits: VideoLimits = VideoLimits()
) -> Frames:
    """Returns frames of a video file or a GIF.

    Args:
        source: the file.
        choose: which frames are taken; numbers outside the video mean its first or last frame.
        limits: what the video may cost.

    Raises:
        SampleError: "unreadable": it has no frames, or takes too long; "too_many_pixels"; or
            "missing_decoder": the package that decodes videos is not installed.
    """
    clock = _Clock(limits, source)
    with _explained(source), open_image(source) as file:
        if _is_gif(file):
            return _gif_frames(file, choose, clock)
        with _opened(file, limits, source) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0) or 1.0
            total = stream.frames or _count(container, stream, clock)
            if not total:
                raise IndexError("it has no frames")
            wanted = [min(max(i, 0), total - 1) for i in choose(total, rate)]
            return _decode(container, stream, wanted, rate, clock)


@dataclasses.dataclass
class _Clock:
    """Refuses frames that are too large, and videos that take too long."""

    limits: VideoLimits
    source: ImageSource

    def __post_init__(self):
        self.begun = time.monotonic()

    def look(self, width: int, height: int) -> None:
        """Looks at a decoded frame. Raises SampleError."""
        check_pixels((width, height), self.limits.max_pixels, self.source)
        seconds = self.limits.seconds
        if seconds is not None and time.monotonic() - self.begun > seconds:
            raise SampleError(
                "unreadable",
                f"decoding the video takes over {seconds:g} s.",
                "Cut the video, or scale it down.",
                _name(self.source),
            )


def _name(source: ImageSource) -> str:
    return "the encoded video" if isinstance(source, bytes) else shorten(str(source), 300)


@contextlib.contextmanager
def _explained(source: ImageSource) -> Iterator[None]:
    """Turns whatever the decoders raise into a SampleError."""
    try:
        yield
    # A store that does not answer says nothing about a video: the run stops, and goes on later.
    except (SampleError, ConfigError, StorageError, MemoryError):
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        said = getattr(error, "strerror", None) or shorten(str(error))
        raise SampleError(
            "unreadable",
            f"the video cannot be decoded ({type(error).__name__}: {said}).",
            "Download the file again, or put a folder of frames in its place.",
            _name(source),
        ) from error


@contextlib.contextmanager
def _opened(file: BinaryIO, limits: VideoLimits, source: ImageSource) -> Iterator[tuple[Any, Any]]:
    """Opens a video file; yields its container and its first stream of pictures."""
    try:
        av = require("av", extra="video", purpose="decoding video files")
    except ConfigError as error:
        raise SampleError("missing_decoder", f"{error}.", "", _name(source)) from None
    with av.open(file, options=dict(_OPTIONS)) as container:
        if not container.streams.video:
            raise IndexError("it has no pictures")
        stream = container.streams.video[0]
        size = stream.codec_context.width, stream.codec_context.height
        check_pixels(size, limits.max_pixels, source)
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        yield container, stream


def _errors() -> tuple[type[Exception], ...]:
    """Returns what PyAV raises where the data of a file are damaged."""
    av = require("av", extra="video", purpose="decoding video files")
    return (av.error.FFmpegError,)


def _count(container: Any, stream: Any, clock: _Clock) -> int:
    """Returns the number of frames by decoding all of them, up to damaged data."""
    count = 0
    with contextlib.suppress(*_errors()):
        for frame in container.decode(stream):
            clock.look(frame.width, frame.height)
            count += 1
    return count


def _decode(
    container: Any, stream: Any, wanted: Sequence[int], rate: float, clock: _Clock
) -> Frames:
    """Returns frames by number; what lies behind damaged data is the last frame before it."""
    begun = float((stream.start_time or 0) * stream.time_base)
    found: dict[int, Image.Image] = {}
    frames, position, damaged = iter(()), None, False
    for number in sorted(set(wanted)):
        last = None
        try:
            if position is None or number - position > _NEAR:
                goal = int((begun + number / rate) / stream.time_base)
                container.seek(goal, stream=stream, backward=True)
                frames = container.decode(stream)
            for frame in frames:
                clock.look(frame.width, frame.height)
                last = frame
                position = round((float(frame.time or 0.0) - begun) * rate)
                if position >= number:
                    break
        except _errors():
            damaged = True
        if last is not None:
            found[number] = last.to_image()
        elif found:  # behind the last frame: damage, or the header counted one too many
            found[number] = found[max(found)]
            damaged = damaged or number - (position or 0) > 1
        else:
            raise IndexError("none of its frames can be decoded")
    return Frames([found[number] for number in wanted], damaged)


def _is_gif(file: BinaryIO) -> bool:
    head = file.read(4)
    file.seek(0)
    return head == b"GIF8"


def _open_gif(file: BinaryIO) -> Image.Image:
    with pillow_globals():  # Pillow's own limit of pixels warns, or is below ours
        return Image.open(file)


def _gif_frames(file: BinaryIO, choose: Choose, clock: _Clock) -> Frames:
    found: dict[int, Image.Image] = {}
    damaged = False
    with _open_gif(file) as image:
        clock.look(*image.size)
        total = getattr(image, "n_frames", 1)
        duration = image.info.get("duration") or 0
        rate = 1000 / duration if duration else _GIF_RATE
        wanted = [min(max(i, 0), total - 1) for i in choose(total, rate)]
        for number in sorted(set(wanted)):
            try:
                image.seek(number)
                clock.look(*image.size)
                found[number] = image.convert("RGB")
            except (OSError, EOFError, SyntaxError):
                if not found:
                    raise
                found[number], damaged = found[max(found)], True
    return Frames([found[number] for number in wanted], damaged)


def clip_bounds(
    total: int, rate: float, clip: tuple[float, float] | None, where: str
) -> tuple[int, int]:
    """Returns the first frame of a clip and the one behind its last.

    Args:
        total: frames of the video.
        rate: frames per second.
        clip: begin and end in seconds; None takes the whole video.
        where: names the video in messages.

    Raises:
        SampleError: "unreadable": the video ends before the clip begins.
    """
    if clip is None:
        return 0, total
    first = math.floor(clip[0] * rate)
    if first >= total:
        raise SampleError(
            "unreadable",
            f"the clip begins at {clip[0]:g} s, the video ends at {total / rate:.1f} s.",
            'Correct "clip", which gives seconds.',
            where,
        )
    return first, max(first + 1, min(total, math.ceil(clip[1] * rate)))


def encoded_frame(name: str, image: Image.Image) -> VideoFrame:
    """Returns a decoded frame as a file in memory, without loss."""
    file = io.BytesIO()
    image.save(file, "PPM")
    return VideoFrame(name, file.getvalue())
