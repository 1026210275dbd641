"""Settings of the input pipeline (design: data.md 3, 7, 10 to 15)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.ranges import COUNT, MOST, SHARE, Range, check_ranges

MOST_FRAMES = 65_536  # of a video
MAX_PIXELS = 178_956_970  # beyond it Pillow refuses an image as a decompression bomb


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Describes the rows of batch_mode `pack`, each `data.max_length` tokens long.

    Attributes:
        tiles: Tile slots per row; None is 2 % more than the samples need on average, so that
            tokens are what fills a row.
        open_rows: Samples that a row chooses among; more of them mix less freely. Runs that began
            with version 0.1.0 choose a row of so many for each sample.
    """

    tiles: int | None = None
    open_rows: int = 64

    def __post_init__(self):
        check_ranges(self, "data.pack.", tiles=COUNT, open_rows=COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Says how image files are read.

    Attributes:
        trust_sizes: Whether to take width and height from the annotation where it states them;
            False reads every image header.
        max_pixels: Larger images are bad samples.
        exif: What to do with an EXIF orientation; the release ignores it.
        truncated: Whether damaged files are used as far as they can be decoded, or are bad
            samples.
    """

    trust_sizes: bool = True
    max_pixels: int = MAX_PIXELS
    exif: Literal["ignore", "apply"] = "ignore"
    truncated: Literal["use", "reject"] = "use"

    def __post_init__(self):
        check_ranges(self, "data.images.", max_pixels=Range(1, MOST))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Says how videos are read.

    Attributes:
        min_frames, max_frames: The number of frames is uniform between them, both included.
        template: How the prompt announces the frames.
    """

    min_frames: int = 4
    max_frames: int = 12
    template: Literal["model_card", "x_release", "internvl2_5"] = "model_card"

    def __post_init__(self):
        frames = Range(1, MOST_FRAMES)
        check_ranges(self, "data.video.", min_frames=frames, max_frames=frames)
        if self.max_frames < self.min_frames:
            raise ConfigError(
                f"data.video.max_frames {self.max_frames} is below data.video.min_frames "
                f"{self.min_frames}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Says what is kept on the local disk of files behind URLs.

    Attributes:
        folder: Local folder of the copies, which all runs of a host may share; None is
            INTERNVLX_CACHE, or ~/.cache/internvlx_jax.
        max_gb: Limit of all copies together, in 10^9 bytes. 0 keeps no images, and annotations
            without limit.
        requests: Images that a process asks for at the same time.
    """

    folder: str | None = None
    max_gb: float = 0.0
    requests: int = 32

    def __post_init__(self):
        check_ranges(self, "data.cache.", max_gb=Range(0, MOST), requests=Range(1, 1024))
        if self.folder and "://" in self.folder:
            raise ConfigError(
                f"data.cache.folder must be a folder of this host's disk, got {self.folder}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Says what a bad sample does.

    Attributes:
        on_bad: `replace` takes another sample of the same bucket, `skip` leaves the slot empty,
            `fail` stops the run.
        max_share: The run stops when a larger share of a dataset's samples is bad; a small dataset
            is judged as if it had 100 samples.
        exclude: Quarantine files of earlier runs; the samples that they list are left out.
    """

    on_bad: Literal["replace", "skip", "fail"] = "replace"
    max_share: float = 0.05
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(self, "data.faults.", max_share=SHARE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Says where samples come from and how they are batched.

    Attributes:
        meta, val_meta: InternVL meta JSON of training and validation data.
        tokenizer: Folder or file of the tokenizer; None takes that of the checkpoint in
            `init_from`.
        mixture: `repeat` takes every dataset as often as its "repeat_time" says. `weight` gives
            each the share of its "weight", `sqrt` that of the square root of its size, of as many
            samples per epoch.
        batch_mode: `tokens` fills buckets and keeps tokens per step near `tokens_per_step`,
            `samples` fills buckets and uses one number of rows, `pack` puts several samples into
            rows of `max_length` tokens.
        max_length: Token slots of the longest bucket, or of a packed row; with LVTC those of the
            long layout.
        length_step: Samples whose lengths round up to the same multiple of it may share a bucket,
            which is as long as its longest sample needs, to a multiple of 16.
        tokens_per_step: Token slots per step in `tokens` and `pack` mode.
        tiles_per_step: Bounds the tile slots per step in `tokens` mode; None is no bound.
        samples_per_step: Rows per step in `samples` mode.
        max_executables: At most this many (tiles, length) buckets remain; the rarest merge upward.
        row_quantum: Rows per step are a multiple of it; None is data-parallel devices *
            accumulation of the first start. It is part of the order of the data: a run can go on
            with any number of devices that divides it.
        pack, images, video, cache, faults: See their classes.
        loss_reduction: Weight of a supervised token in a sample with n of them: 1, 1/n or
            1/sqrt(n).
        special_text: What reserved text inside a turn does: reject the sample, escape it, or allow
            it.
        index_dir: Folder of the size indexes; None is beside each annotation.
        index_workers: Processes that make the size index of a large annotation; None is one per
            core.
        num_workers: Loader processes; 0 decodes in threads of this process.
    """

    meta: str
    val_meta: str | None = None
    tokenizer: str | None = None
    mixture: Literal["repeat", "weight", "sqrt"] = "repeat"
    batch_mode: Literal["tokens", "samples", "pack"] = "tokens"
    max_length: int = 4096
    length_step: int = 64
    tokens_per_step: int = 65536
    tiles_per_step: int | None = None
    samples_per_step: int = 128
    max_executables: int = 16
    row_quantum: int | None = None
    pack: PackConfig = PackConfig()
    images: ImageConfig = ImageConfig()
    video: VideoConfig = VideoConfig()
    cache: CacheConfig = CacheConfig()
    faults: FaultConfig = FaultConfig()
    loss_reduction: Literal["token", "sample", "square"] = "token"
    special_text: Literal["reject", "escape", "allow"] = "reject"
    index_dir: str | None = None
    index_workers: int | None = None
    num_workers: int = 0

    def __post_init__(self):
        check_ranges(
            self,
            "data.",
            max_length=COUNT,
            length_step=COUNT,
            tokens_per_step=COUNT,
            tiles_per_step=COUNT,
            samples_per_step=COUNT,
            max_executables=COUNT,
            row_quantum=COUNT,
            index_workers=COUNT,
            num_workers=Range(0, 1024),
        )
        if self.max_length % self.length_step:
            raise ConfigError(
                f"data.max_length {self.max_length} is not a multiple of data.length_step "
                f"{self.length_step}"
            )
