"""Requests -> batches of model inputs (design: evaluation.md 1, 4, 5, 9).

The one place where a conversation becomes tokens and tiles. Image headers and the prompt give each
request its shape, and requests of one shape form batches, the same ones on every process. Images
are decoded afterwards, ahead of their use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import RopeConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.buckets import Bucket, smallest_bucket
from internvlx_jax.data.encode import Encoded, encode_prompt
from internvlx_jax.data.images import ImageSource, image_size, load_image, open_image
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tiles import choose_grid, cut_tiles, tile_count
from internvlx_jax.data.video_files import OneTile
from internvlx_jax.inference.requests import GenerationSpec, Request, Tiler

# Requests are planned this many at a time: their image headers are read and their prompts encoded
# before the first of them is decoded.
WINDOW = 4096
UNPLANNED = -1
# What load_image counts, and what to do about it.
DECODED_ANYWAY = {
    "truncated": "the file is damaged; what could be decoded is used, the rest is blank. Replace "
    "the file.",
    "16bit": "16-bit values are shifted down to 8 bits. Convert the file if its values use another "
    "range.",
}


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Requests of one shape.

    Attributes:
        bucket: shape of a row.
        numbers: numbers of its requests, at most `rows`.
        rows: rows of the batch over all processes; those behind the requests are empty.
    """

    bucket: Bucket
    numbers: tuple[int, ...]
    rows: int


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """One batch on this process.

    Attributes:
        batch: the plan of all processes.
        numbers: requests of this process.
        errors: requests that failed while they were read.
        rows: None where there is no request, or none that can be read.
        inputs: rows as arrays.
        images: number of images in the requests.
    """

    batch: PlannedBatch
    numbers: tuple[int, ...]
    errors: dict[int, SampleError]
    rows: list[Row | None]
    inputs: Inputs
    images: int = 0


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Numbers of rows that batches may have.

    Attributes:
        rows: rows of a full batch, a multiple of `shards`.
        shards: parts into which devices divide a batch.
        fit: whether a batch with fewer requests has fewer rows: the next power of two per shard,
            so that few shapes are compiled. Otherwise every batch has the rows of a full one.
    """

    rows: int
    shards: int
    fit: bool

    def of(self, requests: int) -> int:
        """Returns the rows of a batch with that many requests."""
        if not self.fit:
            return self.rows
        per_shard = -(-requests // self.shards)
        return min(self.rows, self.shards * 2 ** (per_shard - 1).bit_length())


def prepare_batches(
    requests: Mapping[int, Request],
    spec: GenerationSpec,
    prompts: PromptBuilder,
    sizes: BatchSizes,
) -> Iterator[LoadedBatch | dict[int, SampleError]]:
    """Yields this process's rows of each batch; images are decoded ahead, in threads.

    Requests that cannot be put to the model come by number with what is wrong with them, on the
    first process.

    Args:
        requests: requests by number, the same on every process.
        spec: how they are asked.
        prompts: makes rows of them.
        sizes: rows of a batch.
    """
    numbers, threads = sorted(requests), min(4, os.cpu_count() or 1)
    for first in range(0, len(numbers), WINDOW):
        window = {number: requests[number] for number in numbers[first : first + WINDOW]}
        batches, failed = _plan(window, spec, prompts, sizes)
        if failed:
            yield failed
        yield from (
            grain.MapDataset.source(batches)
            .map(lambda batch, window=window: prompts.load(batch, window, spec))
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        )


def _plan(
    requests: Mapping[int, Request],
    spec: GenerationSpec,
    prompts: PromptBuilder,
    sizes: BatchSizes,
) -> tuple[list[PlannedBatch], dict[int, SampleError]]:
    """Groups requests by shape. The first process decides; the others receive its plan.

    Returns:
        Batches of all processes, and on the first process the requests that failed by number.
    """
    shapes = np.full((len(requests), 3), UNPLANNED, np.int32)
    failed: dict[int, SampleError] = {}
    if jax.process_index() == 0:
        found = _buckets(requests, spec, prompts)
        for row, (number, bucket) in enumerate(found.items()):
            if isinstance(bucket, SampleError):
                failed[number] = bucket
            else:
                shapes[row] = dataclasses.astuple(bucket)
    if jax.process_count() > 1:
        shapes = np.asarray(multihost_utils.broadcast_one_to_all(shapes))
    groups: dict[Bucket, list[int]] = defaultdict(list)
    for number, shape in zip(requests, shapes.tolist(), strict=True):
        if UNPLANNED not in shape:
            groups[Bucket(*shape)].append(number)
    chunks = [
        (bucket, tuple(group[i : i + sizes.rows]))
        for bucket, group in sorted(groups.items())
        for i in range(0, len(group), sizes.rows)
    ]
    return [PlannedBatch(bucket, chunk, sizes.of(len(chunk))) for bucket, chunk in chunks], failed


def _buckets(
    requests: Mapping[int, Request], spec: GenerationSpec, prompts: PromptBuilder
) -> dict[int, Bucket | SampleError]:
    """Returns the shape of each request, or what is wrong with it; headers are read in threads."""

    def bucket(request: Request) -> Bucket | SampleError:
        try:
            return prompts.bucket(request, spec)
        except SampleError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(requests, pool.map(bucket, requests.values()), strict=True))


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Turns requests into rows for one model.

    Attributes:
        processor: tokenizer, template and tiles of the model.
        rope: positions of its decoder, which bound prompt and answer together.
    """

    processor: Processor
    rope: RopeConfig

    def bucket(self, request: Request, spec: GenerationSpec) -> Bucket:
        """Returns the shape that the request needs, from image headers alone.

        Raises:
            SampleError: an image or a placeholder is wrong, or the prompt is too long.
        """
        with located(request.where):
            turns = [count_tiles(spec.tiler, images) for images in request.images_per_turn]
            counts = [n for blocks in turns for n in blocks]
            length = len(self.encode(request, turns).tokens)
            bucket = smallest_bucket(
                sum(counts), length, saved_per_tile=self.processor.saved_per_tile
            )
            total = bucket.length + spec.max_new_tokens
            if total > self.rope.max_positions and not self.rope.allow_longer:
                raise SampleError(
                    "too_long",
                    f"a prompt of {length} tokens (padded to {bucket.length}) and "
                    f"{spec.max_new_tokens} new ones are more than the decoder's "
                    f"{self.rope.max_positions} positions.",
                    "Lower max_num or max_new_tokens, or shorten the prompt or its history.",
                )
            return bucket

    def load(
        self, batch: PlannedBatch, requests: Mapping[int, Request], spec: GenerationSpec
    ) -> LoadedBatch:
        """Returns this process's rows of a batch; a request that cannot be read has its error."""
        here = batch.rows // jax.process_count()
        first = jax.process_index() * here
        numbers = batch.numbers[first : first + here]
        rows: list[Row | None] = [None] * here
        errors: dict[int, SampleError] = {}
        for i, number in enumerate(numbers):
            try:
                rows[i] = self.row(requests[number], batch.bucket, spec)
            except SampleError as error:
                errors[number] = error
        images = sum(len(turn) for n in numbers for turn in requests[n].images_per_turn)
        inputs = self.inputs(rows, batch.bucket)
        return LoadedBatch(batch, numbers, errors, rows, inputs, images)

    def inputs(self, rows: Sequence[Row | None], bucket: Bucket) -> Inputs:
        """Returns the arrays of a batch; None is an empty row."""
        return collate(
            rows,
            bucket,
            tile_size=self.processor.tiles.tile_size,
            tokens_per_tile=self.processor.tokens_per_tile,
            pad_id=self.processor.tokenizer.pad_id,
            lvtc=self.processor.lvtc,
        ).inputs

    def row(self, request: Request, bucket: Bucket, spec: GenerationSpec) -> Row:
        """Returns the tokens and tiles of the request.

        Raises:
            SampleError: an image cannot be decoded, or it has changed since `bucket` was chosen.
        """
        with located(request.where):
            turns = [
                cut_images(spec.tiler, each, request.where) for each in request.images_per_turn
            ]
            blocks = [_blocks(spec.tiler, list(map(len, tiles))) for tiles in turns]
            encoded = self.encode(request, blocks)
            size = spec.tiler.tiles.tile_size
            no_tiles = np.zeros((0, size, size, 3), np.uint8)
            tiles = np.concatenate([no_tiles, *(image for images in turns for image in images)])
            if len(encoded.tokens) > bucket.length or len(tiles) > bucket.tiles:
                raise SampleError(
                    "size_mismatch",
                    "an image has another size than when its batch was planned.",
                    "Leave the images as they are while they are read, and run it again.",
                )
            return Row(encoded.tokens, encoded.labels, encoded.tile_start, tiles)

    def encode(self, request: Request, turns: Sequence[Sequence[int]]) -> Encoded:
        """Encodes a request whose turns have image blocks of so many tiles."""
        processor = self.processor
        return encode_prompt(
            request.prompt,
            history=[(turn.prompt, turn.answer) for turn in request.history],
            system=processor.system_message if request.system is None else request.system,
            template=processor.template,
            tokenizer=processor.tokenizer,
            tiles_per_image=[tiles for blocks in turns for tiles in blocks],
            images_per_turn=list(map(len, turns)),
            tokens_per_tile=processor.tokens_per_tile,
            special_text=processor.special_text,
        )


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Names the request in front of every SampleError of the block."""
    try:
        yield
    except SampleError as error:
        if not where:
            raise
        raise error.at(where) from error.__cause__


# --- tiles ----------------------------------------------------------------------------------------


def count_tiles(tiler: Tiler, images: Sequence[ImageSource]) -> tuple[int, ...]:
    """Returns the tiles of each image block, thumbnails included, from the headers alone.

    Raises:
        SampleError: a header cannot be read.
    """
    counts = []
    for image, limit, factor in _limited(tiler, images):
        width, height = image_size(image)
        counts.append(tile_count(tiler.tiles, factor * width, factor * height, limit))
    return _blocks(tiler, counts)


def cut_images(tiler: Tiler, images: Sequence[ImageSource], where: str) -> list[np.ndarray]:
    """Returns the tiles of each image, uint8[n, s, s, 3] with s the tile size.

    A damaged image that is used all the same causes a warning, which `where` begins.

    Raises:
        SampleError: an image cannot be read.
    """
    return [
        _cut(tiler, image, limit, factor, where) for image, limit, factor in _limited(tiler, images)
    ]


def _blocks(tiler: Tiler, counts: Sequence[int]) -> tuple[int, ...]:
    """Maps the tiles of each image to the tiles of each image block of the prompt."""
    return (sum(counts),) if tiler.policy.one_block and counts else tuple(counts)


def _limited(tiler: Tiler, images: Sequence[ImageSource]) -> list[tuple[ImageSource, int, int]]:
    """Returns (image, tile maximum, enlargement) of each image that is used."""
    still = sum(not isinstance(image, OneTile) for image in images)
    limits = iter(tiler.policy.limits(tiler.tiles.max_num, still) if still else ())
    factors = [tiler.policy.enlarge_first] + [1] * len(images)
    found = []
    for image, factor in zip(images, factors, strict=False):
        limit = 1 if isinstance(image, OneTile) else next(limits, None)
        if limit is None:
            break
        found.append((image, limit, factor))
    return found


def _cut(tiler: Tiler, source: ImageSource, limit: int, factor: int, where: str) -> np.ndarray:
    image = load_image(source)
    for reason in image.info["counted"]:
        message = f"{source}: {DECODED_ANYWAY[reason]}"
        warnings.warn(f"{where}: {message}" if where else message, stacklevel=4)
    if tiler.rgb == "after_tiling":
        image = _unconverted(source)
    if factor > 1:
        size = (factor * image.width, factor * image.height)
        image = image.resize(size, Image.Resampling.BILINEAR)
    if image.mode == "RGB":
        return cut_tiles(image, tiler.tiles, limit)
    return _cut_then_convert(image, tiler.tiles, limit)


def _unconverted(source: ImageSource) -> Image.Image:
    with open_image(source) as opened:
        image = Image.open(opened)
        image.load()
    return image


def _cut_then_convert(image: Image.Image, config: TileConfig, limit: int) -> np.ndarray:
    """Cuts an image of any mode and converts each tile; Pillow resizes palettes by nearest."""
    s = config.tile_size
    columns, rows = choose_grid(config, *image.size, limit)
    bicubic = Image.Resampling.BICUBIC
    canvas = image.resize((columns * s, rows * s), bicubic)
    tiles = [
        canvas.crop((c * s, r * s, (c + 1) * s, (r + 1) * s))
        for r in range(rows)
        for c in range(columns)
    ]
    if config.use_thumbnail and (columns, rows) != (1, 1):
        tiles.append(image.resize((s, s), bicubic))
    return np.stack([np.asarray(tile.convert("RGB")) for tile in tiles])
