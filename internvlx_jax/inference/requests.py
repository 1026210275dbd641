"""Defines what a model is asked, how it is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.images import ImageSource
from internvlx_jax.data.tiles import per_image_limit

Finish = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """An earlier turn of a conversation.

    Attributes:
        prompt: what was asked, with an "<image>" for each of its images.
        answer: what the model wrote.
        images: images of this turn, in the order of their placeholders.
    """

    prompt: str
    answer: str
    images: tuple[ImageSource, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt that waits for an answer.

    Attributes:
        prompt: text of the newest turn.
        images: images of the newest turn, in the order of their placeholders. A first turn without
            a placeholder gets one in front.
        history: earlier turns, oldest first.
        system: replaces the system message of the model; None keeps it.
        where: names the request in messages, such as "data.jsonl line 3".
    """

    prompt: str
    images: tuple[ImageSource, ...] = ()
    history: tuple[Turn, ...] = ()
    system: str | None = None
    where: str = ""

    @property
    def images_per_turn(self) -> tuple[tuple[ImageSource, ...], ...]:
        """Images of every turn, oldest turn first."""
        return (*(turn.images for turn in self.history), self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How the images of one turn share the tile maximum.

    Attributes:
        limits: maps (max_num, number of images) to the tile maximum of each image; images behind
            the last limit are left out.
        one_block: whether all tiles of all images stand in one image block of the prompt.
        enlarge_first: factor by which the first image is enlarged (bilinear) before its grid is
            chosen.
    """

    limits: Callable[[int, int], Sequence[int]]
    one_block: bool = False
    enlarge_first: int = 1


EACH = ImagePolicy(limits=lambda most, images: [per_image_limit(most, images)] * images)


@dataclasses.dataclass(frozen=True)
class Tiler:
    """How the images of a request become tiles: one tile rule and one policy.

    Attributes:
        tiles: the tile rule.
        policy: how several images share the tile maximum.
        rgb: "first" converts an image before cutting. "after_tiling" converts tiles, as the release
            does for some benchmarks, so that palette images are resized by nearest neighbor.
    """

    tiles: TileConfig
    policy: ImagePolicy = EACH
    rgb: Literal["first", "after_tiling"] = "first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """How a set of requests is put to the model.

    Attributes:
        tiler: how their images become tiles.
        max_new_tokens: most tokens of an answer.
        min_new_tokens: number of tokens before the stop token is allowed.
        sampling: how a token is chosen.
        seed: randomness together with the number of a request, so that an answer does not depend
            on the batch.
        stop_strings: texts that end an answer besides the stop token of the template; an answer
            does not contain them.
    """

    tiler: Tiler
    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: the answer without surrounding white space; empty after an error.
        prompt_tokens: length of the prompt, visual tokens included.
        tiles: tiles of all images of the prompt.
        new_tokens: length of the answer, its stop token included.
        finish: why the answer ends: a stop token or stop string, the maximum length, or an error.
        error: why there is no answer.
    """

    text: str
    prompt_tokens: int
    tiles: int
    new_tokens: int
    finish: Finish
    error: SampleError | None = None

    @classmethod
    def failed(cls, error: SampleError) -> Answer:
        """Returns the empty answer of a request that cannot be put to the model."""
        return cls("", 0, 0, 0, "error", error)
