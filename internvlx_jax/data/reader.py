"""One sample of the plan -> tokens, labels, tiles (design: data.md 3, 7, 8.5, 10, 12, 14).

Loader workers hold a `SampleReader`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from internvlx_jax.core.data_config import DataConfig, ImageConfig
from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.local_cache import LocalCache
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.conversations import ChatSample
from internvlx_jax.data.fit import Fitted, fit_sample, supervised_tokens
from internvlx_jax.data.image_fetcher import NOTHING, Ahead, ImageFetcher, Place, may_have_urls
from internvlx_jax.data.images import load_image
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor, in_training
from internvlx_jax.data.sources import ArrayRecords, Source, cache_name, read_sample
from internvlx_jax.data.tiles import cut_images
from internvlx_jax.data.video import FileFrames, choose_frames, list_frames, with_frames
from internvlx_jax.data.video_files import VideoLimits, decode_frames, is_video_file

JPEG_QUALITY = (75, 100)


class ReadSample(NamedTuple):
    """A sample ready for a row.

    Attributes:
        row: its tokens, labels and tiles.
        name: "dataset:line".
        counted: what is wrong with images that are used all the same.
    """

    row: Row
    name: str
    counted: tuple[str, ...]


class SampleReader:
    """Reads samples by dataset and position; (seed, dataset, line, cycle) seeds every random draw.

    Args:
        sources: records of each dataset.
        entries: settings of each dataset.
        processors: how the model reads each dataset.
        config: settings of the pipeline.
        capacity: bounds under which a sample is encoded, those of the size index.
        seed: seed of the run.
        cache: where copies of images behind URLs lie.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        entries: Sequence[DatasetEntry],
        processors: Sequence[Processor],
        config: DataConfig,
        capacity: Capacity,
        seed: int,
        cache: LocalCache,
    ):
        self.images = ImageFetcher(cache, config.cache.requests)
        self.sources, self.entries, self.processors = sources, entries, processors
        self.video, self.loss_reduction = config.video, config.loss_reduction
        self.capacity, self.seed = capacity, seed

    def read(
        self,
        dataset: int,
        position: int,
        *,
        cycle: int,
        tiles: int,
        capacity: Capacity,
        ahead: Ahead = NOTHING,
    ) -> ReadSample:
        """Reads, decodes and encodes one sample.

        Args:
            dataset: number of the dataset.
            position: of the record in its source.
            cycle: how many times the sample has come before.
            tiles: tiles in the plan, which is the number of frames of a video.
            capacity: what the row has free for the sample.
            ahead: what `fetch_ahead` has asked for.

        Raises:
            SampleError: names file and line; "size_mismatch" when the images are larger than the
                index says and the sample no longer fits.
        """
        entry, processor = self.entries[dataset], self.processors[dataset]
        record = ahead.records.get((dataset, position))
        sample = read_sample(
            self.sources[dataset], entry, position, None if record is None else record.result
        )
        generator = np.random.default_rng(
            (self.seed, zlib.crc32(entry.name.encode()), sample.line, cycle)
        )
        images = None
        if sample.video is not None:
            processor = processor.for_frames()
            sample, images = self._with_frames(sample, tiles, processor.images, generator)
        if images is None:
            sample = dataclasses.replace(sample, images=self.images.opened(sample.images, ahead))
            images = _decode(sample, processor.images)
        fitted = fit_sample(processor, sample, [image.size for image in images], self.capacity)
        _check_fits(fitted, processor, sample, capacity, _remedy(sample, self.sources[dataset]))
        # Images of dropped turns have no entry in fitted.tiles.
        cut = cut_images(images[: len(fitted.tiles)], processor.tiles, fitted.limit)
        if entry.data_augment and len(cut):
            cut = _reencode(cut, generator)
        row = Row(
            fitted.encoded.tokens,
            fitted.encoded.labels,
            fitted.encoded.tile_start,
            cut,
            loss_weight=self._loss_weight(fitted.encoded.labels),
            dataset=dataset,
        )
        counted = {reason for image in images for reason in image.info["counted"]}
        return ReadSample(row, sample.name, tuple(sorted(counted)))

    def fetch_ahead(self, places: Iterable[Place]) -> Ahead:
        """Asks for what samples, given by dataset and position, need of remote files."""
        urls: list[str] = []
        records: dict[Place, Future[Any]] = {}
        for dataset, position in places:
            source, entry = self.sources[dataset], self.entries[dataset]
            if isinstance(source, ArrayRecords) and source.is_remote:
                records[dataset, position] = self.images.submit(source.record, position)
            elif may_have_urls(source, entry, position):
                with contextlib.suppress(SampleError):  # said when the sample is read
                    sample = read_sample(source, entry, position)
                    urls += [image for image in sample.images if isinstance(image, str)]
        return Ahead(self.images.ask(urls), records)

    def _with_frames(
        self, sample: ChatSample, count: int, config: ImageConfig, generator: np.random.Generator
    ) -> tuple[ChatSample, list[Image.Image] | None]:
        """Returns the sample with frames for images, and the decoded frames of a video file."""
        video, template = sample.video, self.video.template
        if not isinstance(video, str) or not is_video_file(video):
            frames = list_frames(sample)
            chosen = choose_frames(len(frames), min(count, len(frames)), generator)
            return with_frames(sample, [frames[frame] for frame in chosen], template), None
        images = _decode_video(sample, video, FileFrames(count, generator, sample.clip), config)
        return with_frames(sample, [video] * count, template), images

    def _loss_weight(self, labels: np.ndarray) -> np.ndarray | None:
        if self.loss_reduction == "token":
            return None
        n = supervised_tokens(labels)
        weight = 1 / n if self.loss_reduction == "sample" else n**-0.5
        return np.full(len(labels), weight, np.float32)


def _decode(sample: ChatSample, config: ImageConfig) -> list[Image.Image]:
    """Returns each image decoded.

    Raises:
        SampleError: names file and line.
    """
    try:
        return [
            load_image(
                image,
                max_pixels=config.max_pixels,
                apply_exif=config.exif == "apply",
                use_truncated=config.truncated == "use",
            )
            for image in sample.images
        ]
    except SampleError as error:
        raise in_training(error).at(sample.where) from None


def _decode_video(
    sample: ChatSample, path: str, choose: FileFrames, config: ImageConfig
) -> list[Image.Image]:
    """Returns frames of a video file.

    Raises:
        SampleError: names file and line.
    """
    try:
        images, damaged = decode_frames(path, choose, VideoLimits(config.max_pixels))
        if damaged and config.truncated == "reject":
            raise SampleError(
                "truncated",
                "the video is damaged; only a part of it can be decoded.",
                "Replace the file.",
                path,
            )
    except SampleError as error:
        raise in_training(error).at(sample.where) from None
    for image in images:
        image.info = {"counted": ("truncated",) if damaged else ()}
    return images


def _check_fits(
    fitted: Fitted, processor: Processor, sample: ChatSample, capacity: Capacity, remedy: str
) -> None:
    length, count = len(fitted.encoded.tokens), sum(fitted.tiles)
    if not capacity.fits(length, count, length - count * processor.saved_per_tile):
        raise SampleError(
            "size_mismatch",
            f"the images give {count} tiles and {length} tokens; the sizes in the annotation or in "
            f"the index gave room for {capacity.tiles} and {capacity.length}.",
            remedy,
            sample.where,
        )


def _remedy(sample: ChatSample, source: Source) -> str:
    """Returns what to do about images of another size than the index knows."""
    if all(sample.sizes):
        return "Correct width and height in the annotation, or remove them to have the files read."
    return (
        "The image was replaced after it was measured; a new run measures it again. For this one, "
        f"delete {cache_name(source)}.index-*.npz and .headers-* beside the annotation (or in "
        "data.index_dir)."
    )


def _reencode(tiles: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns uint8[n, s, s, 3]: each tile after JPEG compression of a random quality."""
    low, high = JPEG_QUALITY
    decoded = []
    for tile in tiles:
        file = io.BytesIO()
        Image.fromarray(tile).save(file, "JPEG", quality=int(generator.integers(low, high + 1)))
        decoded.append(np.asarray(Image.open(file)))
    return np.stack(decoded)
