"""The records that an evaluation writes, as JSON in the order of their fields.

(design: evaluation.md 8, 9) A record is written with `to_json` and read with `from_json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.json_text import shown
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.inference.requests import Answer


class Record:
    """A dataclass whose JSON object has its fields in order."""

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], where: str) -> Self:
        """Reads a JSON object; fields that the record does not have are left out.

        Raises:
            ConfigError: a field is missing or has another type; the message begins with `where`.
        """
        if not isinstance(stored, Mapping):
            raise ConfigError(f"{where}: {shown(stored)} is no JSON object; run eval.py again")
        names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] (subclasses are dataclasses)
        if missing := sorted(set(names) - stored.keys()):
            raise ConfigError(f"{where}: no {', '.join(missing)}; run eval.py again")
        hints = get_type_hints(cls)
        for name in names:
            if not _fits(stored[name], hints[name]):
                raise ConfigError(
                    f"{where}: {name} is {shown(stored[name])}, which eval.py does not write; run "
                    "it again"
                )
        return cls(**{name: stored[name] for name in names})


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a JSON value is one of a field with this type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(each, inner[1]) for each in value.values())
    return not isinstance(hint, type) or isinstance(value, hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Record):
    """One line of predictions.jsonl.

    Attributes:
        index: number of the question.
        question_id: its id in the data.
        prompt: what the model was asked.
        images: where the images come from.
        tiles: tiles of all images.
        prompt_tokens: length of the prompt, visual tokens included.
        new_tokens: length of the answer.
        finish: why the answer ends: "stop", "length" or "error".
        raw: what the model wrote.
        prediction: what the metric read from it; None before scoring.
        answer: accepted answers.
        score: score of the row; None before scoring, without references, or without a judge.
        error: why there is no answer.
    """

    index: int
    question_id: str | int
    prompt: str
    images: list[str]
    tiles: int
    prompt_tokens: int
    new_tokens: int
    finish: str
    raw: str
    prediction: str | None
    answer: list[str]
    score: float | None
    error: str | None

    @classmethod
    def unscored(cls, index: int, question: Question, answer: Answer) -> Row:
        """Returns the row of an answer before it is scored."""
        return cls(
            index=index,
            question_id=question.id,
            prompt=question.prompt,
            images=[str(image) for image in question.images],
            tiles=answer.tiles,
            prompt_tokens=answer.prompt_tokens,
            new_tokens=answer.new_tokens,
            finish=answer.finish,
            raw=answer.text,
            prediction=None,
            answer=list(question.answers),
            score=None,
            error=None if answer.error is None else str(answer.error),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFile(Record):
    """A question file of the user, which takes the place of a benchmark.

    Attributes:
        data: path of the file.
        metric: how its answers are scored.
        image_root: folder of its image paths; None is that of the file.
        prompt: how a question is asked, with {question} in it.
    """

    data: str
    metric: str
    image_root: str | None
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointIdentity(Record):
    """The parameters of a stored checkpoint.

    Attributes:
        checkpoint: path or name, as given.
        checkpoint_hash: hash of its files (`identity.checkpoint_hash`).
        dtype: dtype in which they are used.
        ema: whether the average of the trained parameters is used instead of them.
    """

    checkpoint: str
    checkpoint_hash: str
    dtype: str
    ema: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object, without `ema` where it is not used."""
        fields = super().to_json()
        if not self.ema:
            del fields["ema"]
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep(Record):
    """The parameters of a run in memory, after `step` updates."""

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Everything that decides the answers of a task; its hash guards a resumed job.

    Attributes:
        task, protocol: the benchmark and whose prompts it is asked with.
        limit: number of questions asked; None for all.
        tiles: how images are cut.
        rgb: when images are converted to RGB ("first" or "after_tiling").
        template, system_message: the conversation around a prompt.
        max_new_tokens, min_new_tokens: bounds of the length of an answer.
        sampling, seed, stop_strings: how tokens are chosen and what ends an answer.
        data_sha256: hash of each data file.
        question_file: the file of the user, None for a benchmark.
        parameters: the parameters of the model; None while they are not known.
        cot: whether the task was asked for a chain of thought.
        frames: number of frames of a video; None for images, and for the task's own number.
    """

    task: str
    protocol: str
    limit: int | None
    tiles: TileConfig
    rgb: str
    template: str
    system_message: str | None
    max_new_tokens: int
    min_new_tokens: int
    sampling: Sampling
    seed: int
    stop_strings: tuple[str, ...]
    data_sha256: Mapping[str, str]
    question_file: QuestionFile | None = None
    parameters: CheckpointIdentity | TrainingStep | None = None
    cot: bool = False
    frames: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns one flat JSON object; file and parameters add their fields at its end.

        `cot` and `frames` are left out where they are not used.
        """
        fields = dict(vars(self)) | {
            "tiles": dataclasses.asdict(self.tiles),
            "sampling": dataclasses.asdict(self.sampling),
            "stop_strings": list(self.stop_strings),
            "data_sha256": dict(self.data_sha256),
        }
        parts = (fields.pop("question_file"), fields.pop("parameters"))
        unused = [name for name in ("cot", "frames") if not fields[name]]
        for name in unused:
            del fields[name]
        for part in parts:
            fields |= part.to_json() if part is not None else {}
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """summary.json: the score of a task and everything that decides it.

    Attributes:
        task, title, protocol: the benchmark.
        model: name of the checkpoint.
        score: the headline; None without references, or while a judge is missing.
        parts: sub-scores.
        samples: number of questions.
        errors: questions without an answer, which count as wrong.
        stopped_by_length: answers cut at the maximum of new tokens.
        notes: what a reader has to know about the score.
        judge: the judge and the dates of its replies; "pending" while it is missing; None where
            none was asked.
        compat: deviations in force.
        files: further files in the folder of the task.
        settings: `AnswerSettings` as JSON, kept as stored when a summary is read.
        settings_hash: hash of `settings`.
        versions: versions of the libraries.
    """

    task: str
    title: str
    protocol: str
    model: str
    score: float | None
    parts: Mapping[str, Any]
    samples: int
    errors: int
    stopped_by_length: int
    notes: list[str]
    judge: Mapping[str, Any] | str | None
    compat: list[str]
    files: list[str]
    settings: Mapping[str, Any]
    settings_hash: str
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """run.json: what does not change the result, such as where and how fast it was computed.

    Attributes:
        config: settings of the job.
        seconds: duration of the task.
        processes: number of processes.
        devices: number and kind of the devices.
        rows: rows per batch.
        executables: number of compiled executables so far.
        speed: speeds of the job so far.
    """

    config: Mapping[str, Any]
    seconds: float
    processes: int
    devices: str
    rows: int
    executables: int
    speed: Mapping[str, Any]
