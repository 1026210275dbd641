"""One chat sample -> tokens, labels and tiles, for one model (design: data.md 3 to 8, 10)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import PIL.Image

from internvlx_jax.core.data_config import ImageConfig
from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.conversations import ChatSample, Image, Size
from internvlx_jax.data.encode import Encoded, encode_sample
from internvlx_jax.data.images import check_pixels, image_size, load_image
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.templates import Template, get_template
from internvlx_jax.data.tiles import cut_tiles, per_image_limit, tile_count
from internvlx_jax.data.tokenizer import SpecialText, Tokenizer

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
        lvtc: the model's; its batches have a short layout too.
        images: how image files are read.
    """

    tokenizer: Tokenizer
    template: Template
    system_message: str | None
    tiles: TileConfig
    tokens_per_tile: int
    special_text: SpecialText = "reject"
    lvtc: LvtcConfig | None = None
    images: ImageConfig = ImageConfig()

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        special_text: SpecialText = "reject",
        tiles: TileConfig | None = None,
        images: ImageConfig = ImageConfig(),
    ) -> Processor:
        """Returns the processor of a model; `tiles` replaces how the model's own prompt cuts images."""
        prompt = config.prompt
        return cls(
            tokenizer,
            get_template(prompt.template),
            prompt.system_message,
            prompt.tiles if tiles is None else tiles,
            config.tokens_per_tile,
            special_text=special_text,
            lvtc=config.lvtc,
            images=images,
        )

    @property
    def saved_per_tile(self) -> int:
        """Slots by which a tile is shorter in the short layout of LVTC."""
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

    def for_frames(self) -> Processor:
        """The same for the frames of a video: each is one tile, without a thumbnail."""
        return dataclasses.replace(self, tiles=dataclasses.replace(self.tiles, dynamic=False))

    def image_limit(self, n_images: int) -> int:
        """Largest grid of each of the n_images of a sample."""
        return per_image_limit(self.tiles.max_num, max(1, n_images))

    def tiles_per_image(self, sizes: Sequence[Size], limit: int | None = None) -> tuple[int, ...]:
        """Tile counts, thumbnails included, of the images of one sample; `limit` replaces image_limit."""
        limit = self.image_limit(len(sizes)) if limit is None else limit
        return tuple(tile_count(self.tiles, width, height, limit) for width, height in sizes)

    def sizes(
        self, images: Sequence[Image], where: str, stated: Sequence[Size | None] = ()
    ) -> list[Size]:
        """Sizes as stated, else from the image headers; raises SampleError naming file and line."""
        stated = stated if stated and self.images.trust_sizes else [None] * len(images)
        try:
            sizes = [
                size or image_size(image, apply_exif=self.images.exif == "apply")
                for image, size in zip(images, stated, strict=True)
            ]
            for image, size in zip(images, sizes):
                check_pixels(size, self.images.max_pixels, image)
            return sizes
        except SampleError as error:
            raise error.at(where) from None

    def encode(self, sample: ChatSample, tiles_per_image: Sequence[int]) -> Encoded:
        """Tokens and labels; raises SampleError naming file and line."""
        system = self.system_message if sample.system is None else sample.system
        try:
            return encode_sample(
                sample.turns,
                system=system,
                template=self.template,
                tokenizer=self.tokenizer,
                tiles_per_image=tiles_per_image,
                tokens_per_tile=self.tokens_per_tile,
                special_text=self.special_text,
            )
        except SampleError as error:
            raise error.at(sample.where) from None

    def decode(self, images: Sequence[Image], where: str) -> list[PIL.Image.Image]:
        """Each image decoded once; raises SampleError naming file and line."""
        config = self.images
        try:
            return [
                load_image(
                    image,
                    max_pixels=config.max_pixels,
                    apply_exif=config.exif == "apply",
                    use_truncated=config.truncated == "use",
                )
                for image in images
            ]
        except SampleError as error:
            raise error.at(where) from None

    def cut(self, images: Sequence[Image], where: str) -> list[np.ndarray]:
        """Tiles uint8[n, s, s, 3] of each image; raises SampleError naming file and line.

        An image that is used although it is not what it should be is a warning, once a process.
        """
        decoded = self.decode(images, where)
        for path, image in zip(images, decoded):
            for reason in image.info["counted"]:
                warnings.warn(f"{where}: {path}: {DECODED_ANYWAY[reason]}", stacklevel=2)
        return [cut_tiles(image, self.tiles, self.image_limit(len(images))) for image in decoded]

    def concatenate(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Tiles of all images of a sample, none for text: uint8[t, s, s, 3]."""
        size = self.tiles.tile_size
        return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])
