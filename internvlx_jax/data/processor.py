"""One chat sample -> tokens, labels and tiles, for one model (spec: data.md 3 to 8, 10)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from internvlx_jax.data.batch import Row
from internvlx_jax.data.chat import ChatSample, Size
from internvlx_jax.data.encode import Encoded, encode_sample
from internvlx_jax.data.errors import SampleError
from internvlx_jax.data.images import image_size, load_image
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.templates import Template, get_template
from internvlx_jax.data.tiles import TileConfig, cut_tiles, per_image_limit, tile_count
from internvlx_jax.data.tokenizer import SpecialText, Tokenizer
from internvlx_jax.models.config import LvtcConfig

# What load_image counts, and what to do about it.
DECODED_ANYWAY = {
    "truncated": "the file is damaged; what could be decoded is used, the rest is blank. Replace the file.",
    "16bit": "16-bit values are shifted down to 8 bits. Convert the file if its values use another range.",
}


@dataclasses.dataclass(frozen=True)
class Processor:
    """How a model reads samples. Picklable, so that loader workers can hold it.

    Attributes:
        template, system_message: prompt of the model; the message replaces the template's own.
        tiles: how its images are cut.
        tokens_per_tile: visual tokens of a tile.
        special_text: policy for reserved text inside turns.
        lvtc: the model's; its batches have a short frame too.
    """

    tokenizer: Tokenizer
    template: Template
    system_message: str | None
    tiles: TileConfig
    tokens_per_tile: int
    special_text: SpecialText = "reject"
    lvtc: LvtcConfig | None = None

    @property
    def saved_per_tile(self) -> int:
        """Slots by which a tile is shorter in the short frame of LVTC."""
        return 0 if self.lvtc is None else self.lvtc.saved_per_tile

    def for_dataset(self, entry: DatasetEntry) -> Processor:
        """The same with the overrides of one entry of a meta file."""
        tiles = self.tiles
        if entry.tile_rule is not None:
            tiles = dataclasses.replace(tiles, rule=entry.tile_rule)
        if entry.max_dynamic_patch is not None:
            tiles = dataclasses.replace(tiles, max_num=entry.max_dynamic_patch)
        template = self.template if entry.conv_style is None else get_template(entry.conv_style)
        return dataclasses.replace(self, tiles=tiles, template=template)

    def tiles_per_image(self, sizes: Sequence[Size]) -> tuple[int, ...]:
        """Tile counts, thumbnails included, of the images of one sample."""
        limit = per_image_limit(self.tiles.max_num, len(sizes)) if sizes else None
        return tuple(tile_count(self.tiles, width, height, limit) for width, height in sizes)

    @staticmethod
    def sizes(images: Sequence[str], where: str, stated: Sequence[Size | None] = ()) -> list[Size]:
        """Sizes as stated, else from the image headers; raises SampleError naming file and line."""
        try:
            return [size or image_size(path) for path, size in zip(images, stated or [None] * len(images))]
        except SampleError as error:
            raise error.at(where) from None

    def encode(self, sample: ChatSample, tiles_per_image: Sequence[int]) -> Encoded:
        """Tokens and labels; raises SampleError naming file and line."""
        system = self.system_message if sample.system is None else sample.system
        try:
            return encode_sample(sample.turns, system=system, template=self.template, tokenizer=self.tokenizer,
                                 tiles_per_image=tiles_per_image, tokens_per_tile=self.tokens_per_tile,
                                 special_text=self.special_text)
        except SampleError as error:
            raise error.at(sample.where) from None

    def cut(self, images: Sequence[str], where: str) -> list[np.ndarray]:
        """Tiles uint8[n, s, s, 3] of each image, each decoded once; raises SampleError naming file and line.

        An image that is used although it is not what it should be is a warning, once a process.
        """
        limit = per_image_limit(self.tiles.max_num, len(images)) if images else None
        tiles = []
        for path in images:
            try:
                image = load_image(path)
            except SampleError as error:
                raise error.at(where) from None
            for reason in image.info["counted"]:
                warnings.warn(f"{where}: {path}: {DECODED_ANYWAY[reason]}", stacklevel=2)
            tiles.append(cut_tiles(image, self.tiles, limit))
        return tiles

    def concatenate(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Tiles of all images of a sample, none for text: uint8[t, s, s, 3]."""
        size = self.tiles.tile_size
        return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])


@dataclasses.dataclass(frozen=True)
class IndexedSample:
    """A sample whose shape is known before any pixel is decoded: tiles of each image and token length."""

    sample: ChatSample
    tiles_per_image: tuple[int, ...]
    length: int

    @property
    def name(self) -> str:
        return f"{self.sample.dataset}:{self.sample.line}"


def index_sample(processor: Processor, sample: ChatSample, max_length: int) -> IndexedSample:
    """Sizes come from the annotation, else from the image header. Raises SampleError, also when it is too long."""
    tiles = processor.tiles_per_image(processor.sizes(sample.images, sample.where, sample.sizes))
    length = len(processor.encode(sample, tiles).tokens)
    if length > max_length:
        raise SampleError(
            "too_long", f"{length} tokens, {sum(tiles) * processor.tokens_per_tile} of them image tokens of "
            f"{sum(tiles)} tiles, do not fit into data.max_length = {max_length}; image tokens are never cut.",
            "Raise data.max_length, lower model.prompt.tiles.max_num, or shorten the conversation.", sample.where)
    return IndexedSample(sample, tiles, length)


def load_row(processors: Mapping[str, Processor], indexed: IndexedSample) -> Row:
    """Decode one sample. Raises SampleError when an image is not of the size that its annotation states."""
    sample = indexed.sample
    processor = processors[sample.dataset]
    tiles = processor.cut(sample.images, sample.where)
    counts = tuple(len(image) for image in tiles)
    if counts != indexed.tiles_per_image:
        raise SampleError(
            "size_mismatch", f"the stated sizes give {list(indexed.tiles_per_image)} tiles, the files give "
            f"{list(counts)}.", "Correct width and height in the annotation, or remove them to have the files read.",
            sample.where)
    encoded = processor.encode(sample, counts)
    return Row(encoded.tokens, encoded.labels, encoded.tile_start, processor.concatenate(tiles))
