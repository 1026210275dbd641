"""Accepts videos in every form that a caller may have, and takes frames from them.

A frame becomes a tile at once, so that a conversation keeps its tiles and not its videos.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data import storage
from internvlx_jax.data.images import load_image
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from internvlx_jax.data.tiles import cut_tiles
from internvlx_jax.data.video import FileFrames, announced, choose_frames, frames_in
from internvlx_jax.data.video_files import (
    VideoFrame,
    VideoLimits,
    decode_frames,
    encoded_frame,
    is_video_file,
)
from internvlx_jax.inference.images import ImageLike, image_sources

# A path or URL of a file or a folder of frames, an encoded file, or frames: a list of images or
# pixels uint8[F, H, W, 3].
Video = str | os.PathLike | bytes | Sequence[ImageLike] | np.ndarray | None

FRAMES = 8
FRAME_TEXT = "model_card"
ACCEPTED = (
    "give a path or URL of a video file or a folder of frames, the bytes of a video file, a list "
    "of images or a NumPy array uint8[F, H, W, 3]"
)


def video_frames(
    video: Video,
    count: int,
    tiles: TileConfig,
    *,
    name: str = "video",
    limits: VideoLimits = VideoLimits(),
) -> tuple[VideoFrame, ...]:
    """Returns frames from the middles of equal parts of a video, each cut to one tile.

    Args:
        video: what the caller gave; None has no frames.
        count: how many; frames of a list or a folder are at most as many as there are, the last
            one of a file is repeated.
        tiles: how the model cuts images.
        name: names the video in messages.
        limits: what a video file may cost.

    Raises:
        TypeError: the video has a type that is not accepted.
        ValueError: `count` is below 1, or an array has another shape or dtype.
        SampleError: the video cannot be read.
    """
    if video is None:
        return ()
    if count < 1:
        raise ConfigError(f"frames is {count}, it must be at least 1")
    pictures = _pictures(video, count, name, limits)
    one = dataclasses.replace(tiles, dynamic=False)
    return tuple(
        encoded_frame(f"{name} frame {i}", Image.fromarray(cut_tiles(picture, one)[0]))
        for i, picture in enumerate(pictures, 1)
    )


def _pictures(video: Video, count: int, name: str, limits: VideoLimits) -> list[Image.Image]:
    if isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
            raise ConfigError(
                f"{name} is an array {video.dtype}{list(video.shape)}; give RGB frames as "
                "uint8[F, H, W, 3]"
            )
        video = list(video)
    if isinstance(video, (list, tuple)):
        return _chosen(video, count, name)
    if isinstance(video, bytes):
        return decode_frames(video, FileFrames(count), limits).images
    if not isinstance(video, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(video).__name__}; {ACCEPTED}")
    path = os.fspath(video)
    fetched = path[:8].lower().startswith(("data:", "http://", "https://"))
    if not (fetched or is_video_file(path)) and storage.is_folder(path):
        return _chosen(frames_in(path, name), count, name)
    # URLs are fetched, and files read when they are decoded, as those of images are.
    (source,) = image_sources(path) if fetched else (path,)
    return decode_frames(source, FileFrames(count), limits).images


def _chosen(frames: Sequence[ImageLike], count: int, name: str) -> list[Image.Image]:
    if not len(frames):
        raise ConfigError(f"{name} is an empty list; {ACCEPTED}")
    chosen = choose_frames(len(frames), min(count, len(frames)), None)
    return [load_image(source) for source in image_sources([frames[i] for i in chosen])]


def place_video(prompt: str, images: int, frames: int, where: str) -> tuple[str, int]:
    """Announces the frames of a video in place of "<video>", which may stand among images.

    A prompt without "<video>" gets it in front, behind images that are in front too.

    Args:
        prompt: a text; with "<image>" for each image, or with none to have them put in front.
        images: number of images besides the frames.
        frames: number of frames.
        where: names the prompt in messages.

    Returns:
        The text with "<image>" for each image and frame, and the number of images that stand before
        the first frame.

    Raises:
        SampleError: the prompt has more than one "<video>", or another number of "<image>".
    """
    found = prompt.count(VIDEO_PLACEHOLDER)
    if found > 1:
        raise SampleError(
            "placeholder_mismatch",
            'a prompt about a video has at most one "<video>".',
            "Correct the prompt; without it the frames are put in front.",
            where,
        )
    placed = place_images(prompt if found else f"{VIDEO_PLACEHOLDER}\n{prompt}", images, where)
    before = placed.partition(VIDEO_PLACEHOLDER)[0].count(IMAGE_PLACEHOLDER)
    return announced(placed, frames, FRAME_TEXT), before


def place_images(prompt: str, images: int, where: str) -> str:
    """Puts a line with "<image>" for each image in front of a prompt without any.

    Raises:
        SampleError: the prompt has placeholders, but not as many as there are images.
    """
    found = prompt.count(IMAGE_PLACEHOLDER)
    if found not in (0, images):
        raise SampleError(
            "placeholder_mismatch",
            f'{images} image{"s" * (images != 1)} but {found} "<image>" in the prompt.',
            "Write one placeholder for each image, or none to have them put in front.",
            where,
        )
    return prompt if found else f"{IMAGE_PLACEHOLDER}\n" * images + prompt
