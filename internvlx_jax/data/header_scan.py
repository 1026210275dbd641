"""Image headers of a chunk of records, read in threads and remembered (design: data.md 10)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.files import write_text
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.processor import Processor, in_training
from internvlx_jax.data.stamps import stamp_of
from internvlx_jax.data.video_files import VideoLimits, check_video, is_video_file

# Sizes of the images of a sample by its position, or why they cannot be read.
Sizes = dict[int, list[Size] | SampleError]
# What a header scan remembers of a sample: its stamp and the sizes of its images.
_Scanned = dict[int, tuple[int, list[Size]]]


def chunk_sizes(
    samples: dict[int, ChatSample],
    processor: Processor,
    pool: ThreadPoolExecutor,
    cached: Path | None,
) -> tuple[Sizes, dict[int, int]]:
    """Returns the sizes of the images of each sample, and the stamps of those that were measured.

    Threads read the headers of images whose sizes are not stated.
    """

    def sizes_of(sample: ChatSample) -> list[Size] | SampleError:
        try:
            _check_video(sample, processor)
            return processor.sizes(sample.images, sample.where, sample.sizes)
        except SampleError as error:
            return error

    stated = processor.images.trust_sizes
    unknown = {
        position: sample
        for position, sample in samples.items()
        if sample.video is not None or (sample.images and not (stated and all(sample.sizes)))
    }
    known: Sizes = {
        position: sizes_of(sample)
        for position, sample in samples.items()
        if position not in unknown
    }
    if not unknown:
        return known, {}
    stamps = dict(zip(unknown, pool.map(stamp_of, unknown.values()), strict=True))
    scanned = _read_sizes(cached)
    # A file that could not be read may be available by now: only sizes are remembered.
    valid: Sizes = {
        position: sizes
        for position, (stamp, sizes) in scanned.items()
        if position in unknown and stamp == stamps[position]
    }
    missing = {position: sample for position, sample in unknown.items() if position not in valid}
    found = dict(zip(missing, pool.map(sizes_of, missing.values()), strict=True))
    new: _Scanned = {
        position: (stamps[position], sizes)
        for position, sizes in found.items()
        if not isinstance(sizes, SampleError)
    }
    if cached is not None and new:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_text(cached, json.dumps(scanned | new))
    return {**known, **valid, **found}, stamps


def _check_video(sample: ChatSample, processor: Processor) -> None:
    """Opens the video file of a sample, if it has one. Raises SampleError."""
    if not isinstance(sample.video, str) or not is_video_file(sample.video):
        return
    try:
        check_video(sample.video, VideoLimits(processor.images.max_pixels))
    except SampleError as error:
        raise in_training(error).at(sample.where) from None


def _read_sizes(cached: Path | None) -> _Scanned:
    """Returns what a header scan has remembered; a damaged file has nothing."""
    if cached is None or not cached.is_file():
        return {}
    try:
        stored = json.loads(cached.read_bytes())
        return {
            int(position): (int(stamp), [(int(width), int(height)) for width, height in sizes])
            for position, (stamp, sizes) in stored.items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}
