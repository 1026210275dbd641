"""One task of a job: its folder, its answers so far, and its score (design: evaluation.md 8, 9).

Files in the folder of a task:

    predictions.jsonl     one object per question, in the order of the data
    summary.json          the score and everything that decides it; its bytes do not depend on the
                          number of devices and processes
    run.json              how it was computed: devices, batches, time, speed
    MODEL_DATASET.xlsx    what VLMEvalKit scores, if it has such a dataset; .tsv where a text does
                          not fit
    submission.*          what the benchmark's server scores
    judge_requests.jsonl  what a judge would have to be asked
    parts/                answers of a job that is not finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.evaluation.cells import read_texts
from internvlx_jax.evaluation.judge import (
    Judge,
    JudgeError,
    NoJudge,
)
from internvlx_jax.evaluation.prediction_tables import write_tables
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.records import Parts, Row, Summary, read_rows, write_rows
from internvlx_jax.evaluation.scoring import Answered, Context, Result, ScoringError
from internvlx_jax.evaluation.selection import TaskSpec
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.requests import Answer, GenerationSpec

logger = logging.getLogger(__name__)

LIBRARIES = ("internvlx-jax", "jax", "flax", "numpy", "pillow", "sentencepiece")


class TaskRun:
    """One task of a job.

    Attributes:
        spec: the task and its questions.
        folder: folder of its files.
        model_name: name of the checkpoint.
        settings: everything that decides the answers, as JSON.
        rows: rows so far, by index.
        seconds: duration of the answers of this job.
        gone: why the judge gave no more replies; None while it does.
    """

    def __init__(
        self,
        spec: TaskSpec,
        folder: Path,
        model_name: str,
        settings: Mapping[str, Any],
        rows: Mapping[int, Row] | None = None,
    ):
        self.spec, self.folder, self.model_name, self.settings = spec, folder, model_name, settings
        self.rows = dict(rows or {})
        self.seconds = 0.0
        self.gone: JudgeError | None = None

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that identify the settings, whatever the order of their names."""
        stored = json.dumps(self.settings, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(stored).hexdigest()[:16]

    @property
    def parts(self) -> Parts:
        """The answers of a job that is not finished."""
        return Parts(self.folder / "parts", self.hash)

    @property
    def complete(self) -> bool:
        """Whether every question has a row."""
        return len(self.rows) == len(self.spec.questions)

    def recall(self, *, resume: bool) -> None:
        """Takes over the rows of an earlier run.

        Raises:
            ConfigError: there are unfinished answers and `resume` is not set.
        """
        summary, predictions = self.folder / "summary.json", self.folder / "predictions.jsonl"
        if self.parts.exist():
            if not resume:
                raise ConfigError(
                    f"{self.parts.folder} holds answers of an unfinished job; --resume goes on "
                    "with them, or remove the folder"
                )
            self.rows = self.parts.read()
        elif resume and summary.is_file() and predictions.is_file():
            stored = json.loads(summary.read_text(encoding="utf-8"))
            if stored["settings_hash"] == self.hash:
                self.rows = {row.index: row for row in read_rows(predictions)}

    def run(
        self,
        generator: BatchGenerator | None,
        generation: GenerationSpec,
        *,
        shard: tuple[int, int] = (0, 1),
        score: bool = True,
        judge: Judge | None = None,
    ) -> Summary | None:
        """Answers what is not finished, and scores it; all processes call this alike.

        Args:
            generator: the model; None where everything is answered.
            generation: how it is asked.
            shard: (i, n) answers every n-th question from i on.
            score: whether this process scores the answers and writes all files.
            judge: see `finish`.

        Returns:
            The summary; None without `score`.

        Raises:
            ConfigError, ScoringError: see `finish`.
        """
        if generator is not None:
            self._answer(generator, generation, shard)
        return self.finish(judge) if score else None

    def _answer(
        self,
        generator: BatchGenerator,
        generation: GenerationSpec,
        shard: tuple[int, int],
    ) -> None:
        """Answers what is not finished, into part files."""
        questions, (i, n) = self.spec.questions, shard
        numbers = [number for number in self._unfinished() if number % n == i]
        if not numbers:
            return
        begun = time.perf_counter()
        process = jax.process_index()
        with (
            contextlib.closing(self.parts.log(f"{i}of{n}-process{process}")) as log,
            tqdm(
                total=len(numbers), desc=self.spec.task.name, unit="answer", disable=process > 0
            ) as bar,
        ):
            requests = {number: questions[number].request for number in numbers}
            for answers in generator.answer(requests, generation):
                log.append(
                    self.parts.line(unscored_row(number, questions[number], answers[number]))
                    for number in sorted(answers)
                )
                bar.update(min(len(answers) * jax.process_count(), len(numbers) - bar.n))
        self.seconds = time.perf_counter() - begun
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.folder} answered")

    def _unfinished(self) -> list[int]:
        """Lists the questions without a row; the same ones on all processes."""
        done = np.zeros(len(self.spec.questions), np.int32)
        done[sorted(self.rows)] = 1
        if jax.process_count() > 1:  # the first process decides, so that all have the same batches
            done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        return np.flatnonzero(done == 0).tolist()

    def finish(self, judge: Judge | None = None) -> Summary:
        """Joins the parts, scores them and writes all files.

        The answers are in predictions.jsonl before scoring begins, so that --rescore works whatever
        a scorer does. If the judge goes away, the task is pending; its replies are in the cache.

        Args:
            judge: who grades what rules cannot decide; None writes the requests to a file.

        Raises:
            ConfigError: answers are missing.
            ScoringError: the scorer fails.
        """
        if self.parts.exist():
            self.rows = self.parts.read()
        missing = sorted(set(range(len(self.spec.questions))) - self.rows.keys())
        if missing or not self.complete:
            raise ConfigError(
                f"{self.folder}: {len(missing)} of {len(self.spec.questions)} answers are missing, "
                f"the first is {missing[:1]}; run all shards, or --resume"
            )
        self._write_unscored()
        try:
            return self._write(judge or NoJudge())
        except JudgeError as error:
            logger.warning("%s: %s", self.spec.task.name, error)
            self.gone = error
            return self._write(NoJudge(), gone=str(error))

    def _write_unscored(self) -> None:
        """Writes the answers, and a summary without a score."""
        rows = self.ordered_rows()
        unscored = [dataclasses.replace(row, prediction=None, score=None) for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "predictions.jsonl", unscored)
        result = Result(None, [None] * len(rows), [row.raw for row in rows])
        notes = [*self.spec.notes, "not scored yet; --rescore scores predictions.jsonl"]
        summary = self._summary(result, rows, notes, [], NoJudge())
        write_json(self.folder / "summary.json", summary.to_json())

    def ordered_rows(self) -> list[Row]:
        """Returns the rows of all questions."""
        return [self.rows[number] for number in range(len(self.spec.questions))]

    def texts(self, rows: Sequence[Row]) -> list[str]:
        """Returns what is scored: what the model wrote, or the final answer in it."""
        return [self.spec.protocol_spec.read(row.raw) for row in rows]

    def _score(self, rows: Sequence[Row], judge: Judge) -> Result:
        """Scores the rows; `pandas_predictions` makes of their texts what pandas reads back."""
        spec, texts = self.spec, self.texts(rows)
        if "pandas_predictions" in spec.compat:
            texts = read_texts(texts)
        answered = [
            Answered(question, text, row.error)
            for question, text, row in zip(spec.questions, texts, rows, strict=True)
        ]
        try:
            return spec.protocol_spec.score(answered, Context(judge, spec.compat))
        except JudgeError:
            raise
        except Exception as error:
            raise ScoringError(
                f"{spec.task.name}: scoring failed ({type(error).__name__}: {error}). The answers "
                f"are in {self.folder / 'predictions.jsonl'}, and --rescore scores them"
            ) from error

    def _write(self, judge: Judge, gone: str | None = None) -> Summary:
        """Scores and writes all files; `gone` says why the judge gives no more replies."""
        spec, rows = self.spec, self.ordered_rows()
        result = self._score(rows, judge)
        notes = [*spec.notes, *result.notes]
        if gone is not None:
            result = dataclasses.replace(result, score=None, pending=True)
            notes.append(f"the judge gave no more replies: {gone}")
        files = write_tables(self, result)
        requests = self.folder / "judge_requests.jsonl"
        requests.unlink(missing_ok=True)
        if isinstance(judge, NoJudge) and judge.requests:
            judge.write(requests)
            files.append(requests.name)
            notes.append(
                f"{len(judge.requests)} requests to a judge are in {requests.name}; --rescore with "
                "--judge_url asks them"
            )
        scored = zip(rows, result.predictions, result.scores, strict=True)
        write_rows(
            self.folder / "predictions.jsonl",
            [
                dataclasses.replace(row, prediction=prediction, score=score)
                for row, prediction, score in scored
            ],
        )
        summary = self._summary(result, rows, notes, files, judge)
        write_json(self.folder / "summary.json", summary.to_json())
        self.parts.remove()
        return summary

    def _summary(
        self, result: Result, rows: Sequence[Row], notes: list[str], files: list[str], judge: Judge
    ) -> Summary:
        task = self.spec.task
        return Summary(
            task=task.name,
            title=task.title,
            protocol=self.spec.protocol,
            model=self.model_name,
            score=result.score,
            parts=dict(result.parts),
            samples=len(rows),
            errors=sum(row.finish == "error" for row in rows),
            stopped_by_length=sum(row.finish == "length" for row in rows),
            notes=notes,
            judge="pending" if result.pending else judge.describe(),
            compat=sorted(self.spec.compat),
            files=files,
            settings=self.settings,
            settings_hash=self.hash,
            versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        )


def unscored_row(index: int, question: Question, answer: Answer) -> Row:
    """Returns the row of an answer before it is scored."""
    return Row(
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
