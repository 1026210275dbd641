"""Turns the arguments of a caller into requests and a generation spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.json_text import invalid_text
from internvlx_jax.core.ranges import SEED
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.video_files import VideoFrame
from internvlx_jax.inference.images import Images, image_sources
from internvlx_jax.inference.requests import GenerationSpec, Request, Tiler, Turn
from internvlx_jax.inference.videos import place_images, place_video

MAX_NEW_TOKENS = 1024
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


class Options(TypedDict, total=False):
    """Options of `generate`, `stream` and `chat`; see `make_spec` for their meaning."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]
    max_num: int | None
    tile_rule: str | None
    dynamic: bool | None


def make_spec(
    tiles: TileConfig,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    max_num: int | None = None,
    tile_rule: str | None = None,
    dynamic: bool | None = None,
    **sampling: Any,
) -> GenerationSpec:
    """Returns how requests are put to a model.

    Args:
        tiles: how the model cuts images.
        max_new_tokens: most tokens of an answer.
        min_new_tokens: number of tokens before the stop token is allowed.
        seed: randomness of sampling.
        stop: text or texts that end an answer; the answer does not contain them.
        max_num: most tiles per turn, thumbnails not counted; None keeps the model's.
        tile_rule: bound of the grid, "edge", "area" or "off"; None keeps the model's.
        dynamic: False squashes each image into one tile; None keeps the model's.
        **sampling: fields of `Sampling`: temperature, top_k, top_p, repetition_penalty.

    Raises:
        TypeError: an option does not exist.
        ValueError: an option is out of its range (ConfigError is one).
    """
    unknown = sorted(sampling.keys() - set(SAMPLING_FIELDS))
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"unknown option {', '.join(unknown)}; choose from {known}")
    lengths = (("max_new_tokens", max_new_tokens, 1), ("min_new_tokens", min_new_tokens, 0))
    for name, value, least in lengths:
        if value < least:
            raise ConfigError(f"{name} is {value}, it must be at least {least}")
    if not SEED.holds(seed):
        raise ConfigError(f"seed is {seed}, it must be {SEED}")
    return GenerationSpec(
        tiler=Tiler(_replaced(tiles, max_num=max_num, rule=tile_rule, dynamic=dynamic)),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampling=Sampling(**sampling),
        seed=seed,
        stop_strings=_stop_strings(stop),
    )


def _replaced(tiles: TileConfig, **overrides: Any) -> TileConfig:
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(tiles, **given)


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ConfigError("stop holds an empty text, which would end every answer at once")
    return stops


def make_request(
    prompt: str,
    images: Images = None,
    *,
    history: Sequence[Turn] = (),
    system: str | None = None,
    where: str = "prompt",
    read_files: bool = False,
    literal: bool = False,
    frames: Sequence[VideoFrame] = (),
) -> Request:
    """Returns the request of one prompt with its placeholders in place.

    Args:
        prompt: text of the newest turn.
        images: images of the newest turn.
        history: earlier turns, oldest first.
        system: replaces the system message of the model.
        where: names the request in messages.
        read_files: whether image files of the newest turn are read here.
        literal: whether "<image>" in a prompt without images and frames is ordinary text, as it is
            in earlier turns, and no error.
        frames: those of the newest turn's video, beside its images.

    Raises:
        TypeError: the prompt or an image has a type that is not accepted.
        ValueError: an image array has another shape or dtype than uint8[H, W, 3], or a text is not
            valid Unicode.
        SampleError: an image cannot be read, or the placeholders do not fit the images.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{where} is a {type(prompt).__name__}; give a text")
    for name, text in ((where, prompt), ("system", system)):
        bad = invalid_text(text)
        if bad is not None:
            raise ConfigError(f"{name} is not valid Unicode: {bad}")
    asked = [
        make_request(turn.prompt, turn.images, where=f"history[{i}]", literal=True)
        for i, turn in enumerate(history)
    ]
    turns = [
        Turn(request.prompt, turn.answer, request.images)
        for request, turn in zip(asked, history, strict=True)
    ]
    sources = image_sources(images, read_files=read_files)
    if frames:
        placed, before = place_video(prompt, len(sources), len(frames), where)
        sources = (*sources[:before], *frames, *sources[before:])
    else:
        placed = prompt if literal and not sources else place_images(prompt, len(sources), where)
    return Request(
        prompt=placed,
        images=sources,
        history=tuple(turns),
        system=system,
        where=where,
    )
