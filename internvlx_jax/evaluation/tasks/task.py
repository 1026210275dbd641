"""What a benchmark is: its questions, how they are asked and how answers are scored.

(design: evaluation.md 1, 4)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping

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
        source: the questions.
        prompt: how a question is put to the model.
        score: how answers are scored.
        dataset: name of the table of predictions, and of the TSV file where there is one.
        max_new_tokens: most tokens of an answer.
        min_new_tokens: number of tokens before the stop token is allowed.
        images: how several images become tiles, given whether images are cut at all (`dynamic`).
        submission: writes the file for the benchmark's server.
        compat: deviations that belong to the protocol (`scoring.COMPAT`).
        acceptance: deviations that `--compat acceptance` adds.
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
        name: what `--tasks` takes.
        title: name and split, for people.
        samples: published number of questions; another number gives a note. None if not published.
        baseline_tiles: tile maximum of the InternVL2 baseline (plain InternVL tiles); other models
            keep their own.
        protocols: the benchmark under each protocol; the first one is the default.
        same_question: maps the id of a row to the question that it asks, where several rows ask one
            question and all of them must be right; None where each row is a question.
    """

    name: str
    title: str
    samples: int | None
    baseline_tiles: int = 6
    protocols: Mapping[str, ProtocolSpec]
    same_question: Callable[[str | int], Hashable] | None = None

    @property
    def default_protocol(self) -> str:
        """Name of the protocol that is used unless another is asked for."""
        return next(iter(self.protocols))


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
    """Returns a benchmark as the InternVL repository runs it; `rest` are further fields."""
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
    """Returns a benchmark as VLMEvalKit runs InternVL models; `rest` are further fields."""
    return ProtocolSpec(
        source=source,
        prompt=vlm_images(prompt),
        score=score,
        max_new_tokens=VLMEVALKIT_NEW_TOKENS,
        dataset=dataset,
        images=lambda dynamic: VLMEVALKIT,
        **rest,
    )
