"""Frames of videos as images: which ones are taken, and how they are read.

(design: evaluation.md 14) A video is a file, which PyAV decodes, or a folder of frames in its
place.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.extras import require
from internvlx_jax.core.json_text import invalid_text, shown
from internvlx_jax.data.images import ImageSource, open_image
from internvlx_jax.data.video import FileFrames, choose_frames, frames_in
from internvlx_jax.data.video_files import OneTile, decode_frames

FOLDER_RATE = 3.0  # frames per second in a folder, as in TVQA's
JPEG = 75  # quality of the files through which VLMEvalKit passes frames

# Maps (frames wanted, number of frames, frames per second, number of the first frame) to numbers.
Choice = Callable[[int, int, float, int], list[int]]


@dataclasses.dataclass(frozen=True)
class Segments:
    """Takes the middles of equal parts of a clip, as MVBench does.

    Attributes:
        start, end: bounds of the clip in seconds; None takes the whole video.
    """

    start: float | None = None
    end: float | None = None

    def __call__(self, count: int, total: int, rate: float, first: int) -> list[int]:
        """Returns the numbers of `count` frames; frames of short clips are repeated."""
        last = total - 1 + first
        begin = first if self.start is None else max(first, round(self.start * rate))
        stop = last if self.end is None else min(round(self.end * rate), last)
        part = float(stop - begin) / count
        return [int(begin + part / 2 + np.round(part * i)) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Takes frames in equal steps, none at the ends, as VLMEvalKit does for Video-MME."""

    def __call__(self, count: int, total: int, rate: float, first: int) -> list[int]:
        """Returns the numbers of `count` frames."""
        step = total / (count + 1)
        return [int(i * step) + first for i in range(1, count + 1)]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Takes the middles of equal parts, as `generate(video=...)` does."""

    def __call__(self, count: int, total: int, rate: float, first: int) -> list[int]:
        """Returns the numbers of `count` frames; the last one of a short video is repeated."""
        return [first + i for i in FileFrames(count)(total, rate)]


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that are taken from a video file.

    Attributes:
        path: the file.
        choice: which frames are taken.
        count: how many.
        jpeg: whether frames pass through JPEG files, as in VLMEvalKit.
    """

    path: str
    choice: Choice
    count: int
    jpeg: bool


@dataclasses.dataclass(frozen=True)
class VideoFrame(OneTile):
    """One of the frames of a clip.

    Attributes:
        clip: the clip.
        number: position among its frames.
    """

    clip: Clip
    number: int

    def open(self) -> BinaryIO:
        """Returns the encoded frame.

        Raises:
            SampleError: the video cannot be decoded.
        """
        return io.BytesIO(_encoded(self.clip)[self.number])

    def __str__(self) -> str:
        return f"{self.clip.path} frame {self.number + 1} of {self.clip.count}"


@dataclasses.dataclass(frozen=True)
class FolderFrame(OneTile):
    """A frame that is a file in a folder."""

    path: str

    def open(self) -> BinaryIO:
        """Returns the encoded frame."""
        return open_image(self.path)

    def __str__(self) -> str:
        return self.path


def question_frames(video: object, root: Path, count: int, where: str) -> tuple[ImageSource, ...]:
    """Returns the frames of the video of a question file, those that `generate` takes.

    Args:
        video: the field "video" of a line.
        root: folder of its path.
        count: how many; those of a folder are at most as many as there are.
        where: names the line in messages.

    Raises:
        ConfigError: it is no path, there is no such file, its folder has no frames, or the package
            that decodes videos is not installed.
    """
    if not isinstance(video, str) or invalid_text(video) is not None:
        raise ConfigError(
            f'{where}: "video" must be the path of a video file or of a folder of frames, got '
            f"{shown(video)}"
        )
    path = root / video
    if not path.exists():
        raise ConfigError(
            f'{where}: "video" names {path}, which does not exist; correct the path, or name the '
            "folder of the files with --image_root"
        )
    if not path.is_dir():
        return video_frames(path, Parts(), count, jpeg=False, where=where)
    try:
        frames = frames_in(str(path), where)
    except SampleError as error:
        raise ConfigError(f'{where}: "video": {error.problem} {error.remedy}') from None
    chosen = choose_frames(len(frames), min(count, len(frames)), None)
    return tuple(FolderFrame(frames[i]) for i in chosen)


def find_video(path: Path) -> Path | None:
    """Returns the video file, else the folder of frames of its name, else None."""
    return next((each for each in (path, path.with_suffix("")) if each.exists()), None)


def video_frames(
    path: Path, choice: Choice, count: int, *, jpeg: bool, where: str
) -> tuple[ImageSource, ...]:
    """Returns `count` frames of a video; frames of a file are decoded when they are needed.

    Args:
        path: a video file or a folder of frames.
        choice: which frames are taken.
        count: how many.
        jpeg: whether frames of a file pass through JPEG files.
        where: names the question in messages.

    Raises:
        SampleError: the folder has no frames.
        ConfigError: the package that decodes videos is not installed.
    """
    if path.is_dir():
        frames = frames_in(str(path), where)
        first = 1 if isinstance(choice, Segments) else 0  # the reference counts these files from 1
        numbers = choice(count, len(frames), FOLDER_RATE, first)
        return tuple(frames[min(max(i - first, 0), len(frames) - 1)] for i in numbers)
    require("av", extra="video", purpose="decoding video files")
    clip = Clip(str(path), choice, count, jpeg)
    return tuple(VideoFrame(clip, i) for i in range(count))


@functools.lru_cache(maxsize=8)
def _encoded(clip: Clip) -> list[bytes]:
    """Returns the frames of a clip as files; those of the last few clips are kept."""
    frames = decode_frames(clip.path, lambda total, rate: clip.choice(clip.count, total, rate, 0))
    if frames.damaged:
        warnings.warn(
            f"{clip.path}: the video is damaged; its last frame that can be decoded stands for the "
            "later ones. Replace the file.",
            stacklevel=2,
        )
    files = []
    for image in frames.images:
        file = io.BytesIO()
        if clip.jpeg:
            image.save(file, "JPEG", quality=JPEG)
        else:
            image.save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
    return files
