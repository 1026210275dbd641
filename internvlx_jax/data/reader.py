"""One sample of the plan -> tokens, labels, tiles (design: data.md 3, 7, 8.5, 10, 12, 14). What loader workers hold."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.batch import Row
from internvlx_jax.data.conversations import ChatSample
from internvlx_jax.data.fit import Room, fit_sample, supervised_tokens
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source, read_sample
from internvlx_jax.data.tiles import cut_tiles
from internvlx_jax.data.video import choose_frames, list_frames, with_frames

JPEG_QUALITY = (75, 100)


class ReadSample(NamedTuple):
    """A sample ready for a row; `counted` names what is wrong with images that are used all the same."""

    row: Row
    name: str
    counted: tuple[str, ...]


class SampleReader:
    """Reads samples by dataset and position. Every random draw is seeded by (seed, dataset, line, cycle)."""

    def __init__(
        self,
        sources: Sequence[Source],
        entries: Sequence[DatasetEntry],
        processors: Sequence[Processor],
        config: DataConfig,
        room: Room,
        seed: int,
    ):
        self.sources, self.entries, self.processors = sources, entries, processors
        self.video, self.loss_reduction, self.room, self.seed = (
            config.video,
            config.loss_reduction,
            room,
            seed,
        )

    def read(
        self, dataset: int, position: int, *, cycle: int, tiles: int, slot: Room
    ) -> ReadSample:
        """`tiles` is the number of frames that the plan gives a video; `slot` is the room there is for the sample.

        Raises SampleError naming file and line: "size_mismatch" when the images are larger than the index says and
        the sample no longer fits.
        """
        entry, processor = self.entries[dataset], self.processors[dataset]
        sample = read_sample(self.sources[dataset], entry, position)
        generator = np.random.default_rng(
            (self.seed, zlib.crc32(entry.name.encode()), sample.line, cycle)
        )
        if sample.video is not None:
            sample, processor = self._with_frames(sample, tiles, generator), processor.for_frames()
        images = processor.decode(sample.images, sample.where)
        fitted = fit_sample(processor, sample, [image.size for image in images], self.room)
        length, count = len(fitted.encoded.tokens), sum(fitted.tiles)
        short = length - count * processor.saved_per_tile
        if (
            length > slot.length
            or count > slot.tiles
            or (processor.lvtc and short > slot.short_length)
        ):
            raise SampleError(
                "size_mismatch",
                f"the images give {count} tiles and {length} tokens; the sizes in the annotation or in "
                f"the index gave room for {slot.tiles} and {slot.length}.",
                "Correct width and height in the annotation, or remove them to have the files read.",
                sample.where,
            )
        cut = [
            cut_tiles(image, processor.tiles, fitted.limit)
            for image, _ in zip(images, fitted.tiles)
        ]
        if entry.data_augment:
            cut = [_reencode(tiles, generator) for tiles in cut]
        row = Row(
            fitted.encoded.tokens,
            fitted.encoded.labels,
            fitted.encoded.tile_start,
            processor.concatenate(cut),
            loss_weight=self._loss_weight(fitted.encoded.labels),
            dataset=dataset,
        )
        return ReadSample(
            row,
            sample.name,
            tuple(sorted({reason for image in images for reason in image.info["counted"]})),
        )

    def _with_frames(
        self, sample: ChatSample, count: int, generator: np.random.Generator
    ) -> ChatSample:
        frames = list_frames(sample)
        chosen = choose_frames(len(frames), min(count, len(frames)), generator)
        return with_frames(sample, [frames[frame] for frame in chosen], self.video.template)

    def _loss_weight(self, labels: np.ndarray) -> np.ndarray | None:
        if self.loss_reduction == "token":
            return None
        n = supervised_tokens(labels)
        return np.full(
            len(labels), 1 / n if self.loss_reduction == "sample" else n**-0.5, np.float32
        )


def _reencode(tiles: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each tile through JPEG of a random quality. uint8[n, s, s, 3]"""
    low, high = JPEG_QUALITY
    decoded = []
    for tile in tiles:
        file = io.BytesIO()
        Image.fromarray(tile).save(file, "JPEG", quality=int(generator.integers(low, high + 1)))
        decoded.append(np.asarray(Image.open(file)))
    return np.stack(decoded)
