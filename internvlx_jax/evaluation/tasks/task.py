"""What a benchmark is: where its questions lie, how they are put, how answers are scored (design: evaluation.md 1, 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from internvlx_jax.core.evaluation_config import Protocol
from internvlx_jax.evaluation.image_policies import VLMEVALKIT
from internvlx_jax.evaluation.prompts import Prompt, vlm_images
from internvlx_jax.evaluation.scoring import Scorer
from internvlx_jax.evaluation.sources import Source
from internvlx_jax.evaluation.submissions import Submission
from internvlx_jax.inference.tiling import EACH, ImagePolicy

VLMEVALKIT_NEW_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolSpec:
    """A benchmark under one protocol.

    Attributes:
        dataset: name of the table of predictions, and of the TSV where there is one.
        images: how several images become tiles, given whether images are cut at all (`dynamic`).
        min_new_tokens: as many tokens come before the stop token is allowed.
        submission: the file for the benchmark's server.
        compat: deviations that belong to the protocol (scoring.COMPAT); `acceptance` only when asked for.
    """

    source: Source
    prompt: Prompt
    score: Scorer
    dataset: str
    max_new_tokens: int
    min_new_tokens: int = 0
    images: Callable[[bool], ImagePolicy] = lambda dynamic: EACH
    submission: Submission | None = None
    compat: tuple[str, ...] = ()
    acceptance: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        samples: published number of questions; another number is a warning. None where it is not stated.
        baseline_tiles: tile maximum of the InternVL2 baseline (plain InternVL tiles); other models keep their own.
        views: by protocol; the first one is the default.
    """

    name: str
    title: str
    samples: int | None
    baseline_tiles: int = 6
    views: Mapping[Protocol, ProtocolSpec]

    @property
    def default_protocol(self) -> Protocol:
        return next(iter(self.views))


def internvl(
    source: Source,
    prompt: Prompt,
    score: Scorer,
    *,
    max_new_tokens: int,
    dataset: str,
    min_new_tokens: int = 1,
    **rest,
) -> ProtocolSpec:
    """A view as the InternVL repository runs it."""
    return ProtocolSpec(
        source=source,
        prompt=prompt,
        score=score,
        max_new_tokens=max_new_tokens,
        dataset=dataset,
        min_new_tokens=min_new_tokens,
        **rest,
    )


def vlmevalkit(
    source: Source, prompt: Prompt, score: Scorer, *, dataset: str, **rest
) -> ProtocolSpec:
    """A view as VLMEvalKit runs InternVL models."""
    return ProtocolSpec(
        source=source,
        prompt=vlm_images(prompt),
        score=score,
        max_new_tokens=VLMEVALKIT_NEW_TOKENS,
        dataset=dataset,
        images=lambda dynamic: VLMEVALKIT,
        **rest,
    )
