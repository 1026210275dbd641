"""Videos as frames: which ones are taken, how the prompt announces them (design: data.md 3)."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.json_text import shorten
from internvlx_jax.data import storage
from internvlx_jax.data.conversations import ChatSample, Image
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from internvlx_jax.data.video_files import clip_bounds

# template -> (text in front of frame i, text after its image, text after the last one)
_FRAME_TEXT = {
    "model_card": ("Frame{}: ", "\n", "\n"),
    "x_release": ("Frame{}: ", "\n", ""),
    "internvl2_5": ("Frame-{}: ", "\n", "\n"),
}


def list_frames(sample: ChatSample) -> tuple[Image, ...]:
    """Returns all frames of a video that is a folder or a list, in order.

    The frames of a folder are ordered by the number at the end of their names.

    Raises:
        SampleError: "unreadable" for a folder that is missing or has no frames.
    """
    if not isinstance(sample.video, str):
        return sample.video or ()
    return frames_in(sample.video, sample.where)


def frames_in(folder: str, where: str) -> tuple[str, ...]:
    """Returns the paths of the frames in a folder, by the number at the end of their names.

    Raises:
        SampleError: "unreadable" for a folder that is missing or has no frames.
    """
    try:
        names = storage.names_in(folder)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        raise SampleError(
            "unreadable",
            f"{shorten(folder)} is no folder of frames ({type(error).__name__}).",
            'Name a video file or a folder of images, or list the frames, under "video".',
            where,
        ) from None
    names = [
        name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
    ]
    if not names:
        raise SampleError(
            "unreadable",
            f"{shorten(folder)} holds no frames.",
            "Frames are .jpg, .png, .webp or .bmp files.",
            where,
        )
    return tuple(storage.join(folder, name) for name in sorted(names, key=_frame_number))


def _frame_number(name: str) -> tuple[int, str]:
    numbers = re.findall(r"\d+", os.path.splitext(name)[0])
    return int(numbers[-1]) if numbers else 0, name


def choose_frames(available: int, count: int, generator: np.random.Generator | None) -> list[int]:
    """Chooses one frame of each of `count` equal intervals.

    Args:
        available: number of frames of the video.
        count: number of frames to choose, at most `available`.
        generator: draws a uniform frame of each interval; None takes the middle one.

    Returns:
        Positions of the frames, ascending.
    """
    bounds = np.linspace(0, available, count + 1).astype(int)
    low, high = bounds[:-1], bounds[1:]
    return ((low + high - 1) // 2 if generator is None else generator.integers(low, high)).tolist()


@dataclasses.dataclass(frozen=True)
class FileFrames:
    """Chooses the frames of a video file; the last one is repeated where it has too few.

    Attributes:
        count: how many.
        generator: see `choose_frames`.
        clip: part of the video, in seconds; None takes all of it.
        where: names the video in messages.
    """

    count: int
    generator: np.random.Generator | None = None
    clip: tuple[float, float] | None = None
    where: str = ""

    def __call__(self, total: int, rate: float) -> list[int]:
        """Returns the numbers of the frames of a video of `total` frames, `rate` per second."""
        first, end = clip_bounds(total, rate, self.clip, self.where)
        available = end - first
        chosen = choose_frames(available, min(self.count, available), self.generator)
        chosen += chosen[-1:] * (self.count - len(chosen))
        return [first + frame for frame in chosen]


def with_frames(sample: ChatSample, frames: Sequence[Image], template: str) -> ChatSample:
    """Returns the sample with the chosen frames as its images, announced in the first turn."""
    (role, first), *rest = sample.turns
    turns = ((role, announced(first, len(frames), template)), *rest)
    return dataclasses.replace(
        sample, images=tuple(frames), sizes=(None,) * len(frames), turns=turns
    )


def announced(text: str, frames: int, template: str) -> str:
    """Returns a question with "<image>" for each frame in place of its "<video>"."""
    before, between, end = _FRAME_TEXT[template]
    images = (f"{before.format(i)}{IMAGE_PLACEHOLDER}" for i in range(1, frames + 1))
    line = f"{VIDEO_PLACEHOLDER}\n"
    return text.replace(line if line in text else VIDEO_PLACEHOLDER, between.join(images) + end)


def frame_separator(template: str, number: int) -> str:
    """Returns the text between the images of frame `number - 1` and frame `number`."""
    before, between, _ = _FRAME_TEXT[template]
    return between + before.format(number)
