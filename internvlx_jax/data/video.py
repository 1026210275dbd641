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

# template -> (text in front of frame i, text after its image, text after the last one)
_FRAME_TEXT = {
    "model_card": ("Frame{}: ", "\n", "\n"),
    "x_release": ("Frame{}: ", "\n", ""),
    "internvl2_5": ("Frame-{}: ", "\n", "\n"),
}


def list_frames(sample: ChatSample) -> tuple[Image, ...]:
    """Returns all frames of a video in order.

    The frames of a folder are ordered by the number at the end of their names.

    Raises:
        SampleError: "unreadable" for a folder that is missing or has no frames.
    """
    if not isinstance(sample.video, str):
        return sample.video or ()
    try:
        names = storage.names_in(sample.video)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        raise SampleError(
            "unreadable",
            f"{shorten(sample.video)} is no folder of frames ({type(error).__name__}).",
            'Name a folder of images, or list the frames, under "video".',
            sample.where,
        ) from None
    names = [
        name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
    ]
    if not names:
        raise SampleError(
            "unreadable",
            f"{shorten(sample.video)} holds no frames.",
            "Frames are .jpg, .png, .webp or .bmp files.",
            sample.where,
        )
    return tuple(storage.join(sample.video, name) for name in sorted(names, key=_frame_number))


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


def with_frames(sample: ChatSample, frames: Sequence[Image], template: str) -> ChatSample:
    """Returns the sample with the chosen frames as its images, announced in the first turn."""
    before, between, end = _FRAME_TEXT[template]
    text = (
        between.join(f"{before.format(i)}{IMAGE_PLACEHOLDER}" for i in range(1, len(frames) + 1))
        + end
    )
    (role, first), *rest = sample.turns
    placeholder = (
        f"{VIDEO_PLACEHOLDER}\n" if f"{VIDEO_PLACEHOLDER}\n" in first else VIDEO_PLACEHOLDER
    )
    turns = ((role, first.replace(placeholder, text)), *rest)
    return dataclasses.replace(
        sample, images=tuple(frames), sizes=(None,) * len(frames), turns=turns
    )


def frame_separator(template: str, number: int) -> str:
    """Returns the text between the images of frame `number - 1` and frame `number`."""
    before, between, _ = _FRAME_TEXT[template]
    return between + before.format(number)
