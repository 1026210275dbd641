"""What a benchmark is: its questions, how they are asked and how answers are scored.

(design: evaluation.md 1, 4)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from internvlx_jax.evaluation.cot import Cot, boxed_choice
from internvlx_jax.evaluation.image_policies import VLMEVALKIT
from internvlx_jax.evaluation.prompts import Prompt, vlm_choice, vlm_images
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Scorer
from internvlx_jax.evaluation.sources import Source
from internvlx_jax.evaluation.submissions import Submission
from internvlx_jax.inference.requests import EACH, ImagePolicy

VLMEVALKIT_NEW_TOKENS = 4096

# Deviations of all benchmarks of VLMEvalKit; those of other kinds of questions have no effect. The
# first two come from its files, so they do not apply to benchmarks that it has no file of.
VLMEVALKIT_FILES = ("pandas_cells", "pandas_predictions")
VLMEVALKIT_COMPAT = ("option_word_start", "random_option", "yes_no_case")


@dataclasses.dataclass(frozen=True)
class ProtocolSpec:
    """A benchmark under one protocol.

    Attributes:
        source: the questions.
        prompt: how a question is put to the model.
        score: how answers are scored.
        dataset: name of the benchmark in VLMEvalKit and of the table of predictions that it scores;
            empty where it has none, or could not score a table of these questions.
        max_new_tokens: most tokens of an answer.
        min_new_tokens: number of tokens before the stop token is allowed.
        images: how several images become tiles, given whether images are cut at all (`dynamic`).
        submission: writes the file for the benchmark's server.
        compat: deviations that belong to the protocol (`scoring.COMPAT`).
        release: deviations of the InternVL-X release, which `--compat release` takes in place of
            `compat`; None where they are the same.
        table: columns of the table, besides those of `submissions.vlmevalkit_rows`.
        joined: whether the questions are a part of `dataset`, whose table is written when all of
            its tasks are answered.
        samples: published number of questions under this protocol; None takes that of the task, 0
            is unknown.
        baseline_tiles: tile maximum of the InternVL2 baseline under this protocol; None takes that
            of the task.
        read: maps what the model wrote to what is scored and stands in the table of predictions.
        cot: how the benchmark is asked with `--cot`; None if it has no such prompt.
        frames: number of frames of a video; None for images.
    """

    source: Source
    prompt: Prompt
    score: Scorer
    _: dataclasses.KW_ONLY
    max_new_tokens: int
    dataset: str = ""
    min_new_tokens: int = 1
    images: Callable[[bool], ImagePolicy] = lambda dynamic: EACH
    submission: Submission | None = None
    compat: tuple[str, ...] = ()
    release: tuple[str, ...] | None = None
    table: Callable[[Question], Mapping[str, Any]] = lambda question: {}
    joined: bool = False
    samples: int | None = None
    baseline_tiles: int | None = None
    read: Callable[[str], str] = str
    cot: Cot | None = None
    frames: int | None = None

    def reasoning(self) -> ProtocolSpec:
        """Returns the benchmark as `--cot` asks it; one without such a prompt stays as it is."""
        if self.cot is None:
            return self
        return dataclasses.replace(
            self,
            prompt=self.cot.prompt,
            read=self.cot.read,
            score=self.cot.score or self.score,
            dataset=self.cot.dataset or self.dataset,
            max_new_tokens=self.cot.max_new_tokens,
        )

    def with_frames(self, count: int) -> ProtocolSpec:
        """Returns the benchmark with another number of frames per video, if it has videos.

        VLMEvalKit names the number in its datasets, such as MVBench_8frame.
        """
        if self.frames is None:
            return self
        dataset = self.dataset.replace(f"_{self.frames}frame", f"_{count}frame")
        return dataclasses.replace(self, frames=count, dataset=dataset)


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


# A benchmark as the InternVL repository runs it is what the fields say, without additions.
internvl = ProtocolSpec


def vlmevalkit(
    source: Source,
    prompt: Prompt,
    score: Scorer,
    *,
    dataset: str,
    compat: tuple[str, ...] = (),
    images: Callable[[bool], ImagePolicy] = lambda dynamic: VLMEVALKIT,
    **rest,
) -> ProtocolSpec:
    """Returns a benchmark as VLMEvalKit runs InternVL models; `rest` are further fields.

    VLMEvalKit asks all multiple-choice benchmarks for reasoning in the same words.
    """
    cot: Cot | None = rest.pop("cot", boxed_choice(prompt) if prompt is vlm_choice else None)
    if cot is not None:
        cot = dataclasses.replace(cot, prompt=vlm_images(cot.prompt))
    files = VLMEVALKIT_FILES if dataset else ()
    return ProtocolSpec(
        source=source,
        prompt=vlm_images(prompt),
        score=score,
        max_new_tokens=VLMEVALKIT_NEW_TOKENS,
        min_new_tokens=0,
        dataset=dataset,
        images=images,
        compat=(*files, *VLMEVALKIT_COMPAT, *compat),
        cot=cot,
        **rest,
    )
