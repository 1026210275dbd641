"""What a model needs to know of samples: tokenizer, template, tiles (design: data.md 3 to 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from internvlx_jax.core.data_config import ImageConfig
from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.conversations import Image, Size
from internvlx_jax.data.images import check_pixels, image_size
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.templates import Template, get_template
from internvlx_jax.data.tokenizer import SpecialText, Tokenizer

# What training data have beside a path: settings, and a root that paths are joined with.
_REMEDIES = {
    "unreadable": 'Check the file and its path ("root" of the meta file joined with "image").',
    "truncated": 'Replace the file, or set data.images.truncated="use".',
    "too_many_pixels": "Scale the image down, or raise data.images.max_pixels.",
}


def in_training(error: SampleError) -> SampleError:
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
            raise in_training(error).at(where) from None
