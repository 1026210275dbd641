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
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.conversations import ChatSample, Image, Size
from internvlx_jax.data.encode import Encoded, encode_sample
from internvlx_jax.data.images import check_pixels, image_size, load_image
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.templates import Template, get_template
from internvlx_jax.data.tiles import cut_tiles, per_image_limit, tile_count
from internvlx_jax.data.tokenizer import SpecialText, Tokenizer

# What load_image counts, and what to do about it.
DECODED_ANYWAY = {
    "truncated": "the file is damaged; what could be decoded is used, the rest is blank. Replace "
    "the file.",
    "16bit": "16-bit values are shifted down to 8 bits. Convert the file if its values use another "
    "range.",
}


# What training data have beside a path: settings, and a root that paths are joined with.
_REMEDIES = {
    "unreadable": 'Check the file and its path ("root" of the meta file joined with "image").',
    "truncated": 'Replace the file, or set data.images.truncated="use".',
    "too_many_pixels": "Scale the image down, or raise data.images.max_pixels.",
}


def _in_training(error: SampleError) -> SampleError:
    """Returns the error of an image with what to do about it in training data."""
    remedy = _REMEDIES.get(error.reason, error.remedy)
    return SampleError(error.reason, error.problem, remedy, error.where)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Describes how a model reads samples. Loader workers hold a pickled copy.

    Attributes:
        tokenizer: of the model.
        template: chat template of the model.
        system_message: replaces the template's own; None keeps that.
        tiles: how images are cut.
        tokens_per_tile: image tokens per tile.
        special_text: what reserved text inside turns does.
        lvtc: LVTC of the model, whose batches have a short layout too; None without it.
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
        """Returns the processor of a model.

        Args:
            config: the model.
            tokenizer: its tokenizer.
            special_text: what reserved text inside turns does.
            tiles: replaces how the model's own prompt cuts images.
            images: how image files are read.

        Raises:
            ConfigError: the tokenizer has more ids than the model has rows, or it lacks the
                separator of the template.
        """
        prompt = config.prompt
        tokenizer.check_rows(config.decoder.vocab_size)
        template = get_template(prompt.template)
        tokenizer.token_id(template.stop)
        return cls(
            tokenizer,
            template,
            prompt.system_message,
            prompt.tiles if tiles is None else tiles,
            config.tokens_per_tile,
            special_text=special_text,
            lvtc=config.lvtc,
            images=images,
        )

    @property
    def saved_per_tile(self) -> int:
        """Returns the slots by which a tile is shorter in the short layout of LVTC."""
        return 0 if self.lvtc is None else self.lvtc.saved_per_tile

    def for_dataset(self, entry: DatasetEntry) -> Processor:
        """Returns the processor of one entry of a meta file, which may replace settings."""
        tiles = self.tiles
        if entry.tile_rule is not None:
            tiles = dataclasses.replace(tiles, rule=entry.tile_rule)
        if entry.max_dynamic_patch is not None:
            tiles = dataclasses.replace(tiles, max_num=entry.max_dynamic_patch)
        template = self.template if entry.conv_style is None else get_template(entry.conv_style)
        return dataclasses.replace(self, tiles=tiles, template=template)

    def for_frames(self) -> Processor:
        """Returns the processor of video frames: each is one tile, without a thumbnail."""
        return dataclasses.replace(self, tiles=dataclasses.replace(self.tiles, dynamic=False))

    def image_limit(self, n_images: int) -> int:
        """Returns the largest grid of each of the n_images of a sample."""
        return per_image_limit(self.tiles.max_num, max(1, n_images))

    def tiles_per_image(self, sizes: Sequence[Size], limit: int | None = None) -> tuple[int, ...]:
        """Returns the tiles of each image of one sample, thumbnails included.

        Args:
            sizes: width and height of each image, in pixels.
            limit: largest grid of an image; None: that of `image_limit`.
        """
        limit = self.image_limit(len(sizes)) if limit is None else limit
        return tuple(tile_count(self.tiles, width, height, limit) for width, height in sizes)

    def sizes(
        self, images: Sequence[Image], where: str, stated: Sequence[Size | None] = ()
    ) -> list[Size]:
        """Returns width and height of each image, in pixels.

        Args:
            images: paths, URLs or encoded files.
            where: place of the sample, for messages.
            stated: sizes in the annotation; None for an image whose header is to be read.

        Raises:
            SampleError: names file and line.
        """
        stated = stated if stated and self.images.trust_sizes else [None] * len(images)
        try:
            sizes = [
                size or image_size(image, apply_exif=self.images.exif == "apply")
                for image, size in zip(images, stated, strict=True)
            ]
            for image, size in zip(images, sizes, strict=True):
                check_pixels(size, self.images.max_pixels, image)
            return sizes
        except SampleError as error:
            raise _in_training(error).at(where) from None

    def encode(self, sample: ChatSample, tiles_per_image: Sequence[int]) -> Encoded:
        """Returns tokens and labels.

        Raises:
            SampleError: names file and line.
        """
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
        """Returns each image decoded.

        Raises:
            SampleError: names file and line.
        """
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
            raise _in_training(error).at(where) from None

    def cut(self, images: Sequence[Image], where: str) -> list[np.ndarray]:
        """Returns the tiles of each image, uint8[n, s, s, 3].

        A damaged image that is used all the same is a warning, once per process.

        Raises:
            SampleError: names file and line.
        """
        decoded = self.decode(images, where)
        for path, image in zip(images, decoded, strict=True):
            for reason in image.info["counted"]:
                name = "the encoded image" if isinstance(path, bytes) else path
                warnings.warn(f"{where}: {name}: {DECODED_ANYWAY[reason]}", stacklevel=2)
        return [cut_tiles(image, self.tiles, self.image_limit(len(images))) for image in decoded]

    def concatenate(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Returns uint8[t, s, s, 3]: tiles of all images of a sample, none for text."""
        size = self.tiles.tile_size
        return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])

    def collate(self, rows: Sequence[Row | None], bucket: Bucket) -> Batch:
        """Returns a batch of the model's shapes; None is a masked row.

        Raises:
            ValueError: a row does not fit the bucket.
        """
        return collate(
            rows,
            bucket,
            tile_size=self.tiles.tile_size,
            tokens_per_tile=self.tokens_per_tile,
            pad_id=self.tokenizer.pad_id,
            lvtc=self.lvtc,
        )
