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

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import decode_json, encode_line, shown
from internvlx_jax.core.line_log import LineLog, read_whole, segments
from internvlx_jax.core.paths import is_remote
from internvlx_jax.evaluation.cells import read_texts
from internvlx_jax.evaluation.judge import (
    Judge,
    JudgeError,
    NoJudge,
)
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.records import Row, Summary, read_rows, write_rows
from internvlx_jax.evaluation.scoring import Answered, Context, Result, ScoringError
from internvlx_jax.evaluation.selection import TaskSpec
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.tables import write_table
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

    def answer(
        self,
        generator: BatchGenerator,
        generation: GenerationSpec,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        """Answers what is not finished, into part files; all processes call this alike.

        Args:
            generator: the model.
            generation: how it is asked.
            shard: (i, n) answers every n-th question from i on.
        """
        questions, (i, n) = self.spec.questions, shard
        numbers = [number for number in self._unfinished() if number % n == i]
        if not numbers:
            return
        begun = time.perf_counter()
        process = jax.process_index()
        with (
            self.parts.writer(f"{i}of{n}-process{process}") as part,
            tqdm(
                total=len(numbers), desc=self.spec.task.name, unit="answer", disable=process > 0
            ) as bar,
        ):
            requests = {number: questions[number].request for number in numbers}
            for answers in generator.answer(requests, generation):
                part.write(
                    [
                        unscored_row(number, questions[number], answers[number])
                        for number in sorted(answers)
                    ]
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
        rows = self._ordered_rows()
        unscored = [dataclasses.replace(row, prediction=None, score=None) for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "predictions.jsonl", unscored)
        result = Result(None, [None] * len(rows), [row.raw for row in rows])
        notes = [*self.spec.notes, "not scored yet; --rescore scores predictions.jsonl"]
        summary = self._summary(result, rows, notes, [], NoJudge())
        write_json(self.folder / "summary.json", summary.to_json())

    def _ordered_rows(self) -> list[Row]:
        return [self.rows[number] for number in range(len(self.spec.questions))]

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        """Returns what is scored: what the model wrote, or the final answer in it."""
        return [self.spec.protocol_spec.read(row.raw) for row in rows]

    def _score(self, rows: Sequence[Row], judge: Judge) -> Result:
        """Scores the rows; `pandas_predictions` makes of their texts what pandas reads back."""
        spec, texts = self.spec, self._texts(rows)
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
        spec, rows = self.spec, self._ordered_rows()
        result = self._score(rows, judge)
        notes = [*spec.notes, *result.notes]
        if gone is not None:
            result = dataclasses.replace(result, score=None, pending=True)
            notes.append(f"the judge gave no more replies: {gone}")
        files = self._write_tables(rows, result)
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

    def table(self) -> list[dict[str, Any]]:
        """Returns the rows of the table that VLMEvalKit scores."""
        texts = self._texts(self._ordered_rows())
        return vlmevalkit_rows(self.spec.questions, texts, self.spec.protocol_spec.table)

    def _write_tables(self, rows: Sequence[Row], result: Result) -> list[str]:
        """Writes the files for VLMEvalKit and for a server; returns their names."""
        spec, files = self.spec.protocol_spec, []
        if not self.spec.generic and spec.dataset and not spec.joined:
            path = self.folder / f"{self.model_name}_{spec.dataset}"
            files.append(write_table(path, self.table()).name)
        if spec.submission is not None:
            written = spec.submission(self.folder, self.spec.questions, result.predictions)
            files.append(written.name)
        return files

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


class Parts:
    """The part files of one task; all of their rows belong to one settings hash.

    Attributes:
        folder: folder of the part files.
        settings: the settings hash.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def exist(self) -> bool:
        """Whether there is any part file."""
        return any(self.folder.glob("*.jsonl"))

    def read(self) -> dict[int, Row]:
        """Returns all finished rows by index; a line that an interruption cut off does not count.

        Raises:
            ConfigError: rows come from other settings, or two rows of one index differ.
        """
        rows: dict[int, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(read_whole(path).split(b"\n"), start=1):
                try:
                    stored = decode_json(line)
                except ValueError:
                    continue
                where = f"{path} line {number}"
                if not isinstance(stored, dict):
                    raise ConfigError(f"{where}: not a JSON object; remove the line")
                if stored.pop("settings", None) != self.settings:
                    raise ConfigError(
                        f"{where}: answered with other settings (checkpoint, data, prompts, tiles "
                        "or decoding); use them again, another --out_dir, or remove this folder"
                    )
                row = Row.from_json(stored, where)
                if not isinstance(row.index, int):
                    raise ConfigError(f"{where}: index is {shown(row.index)}; remove the line")
                if rows.setdefault(row.index, row) != row:
                    raise ConfigError(
                        f"{where}: index {row.index} has two different answers; remove "
                        f"{self.folder}"
                    )
        return rows

    def writer(self, name: str) -> PartWriter:
        """Opens NAME.jsonl; rows are appended behind those of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.folder / f"{name}.jsonl", self.settings)

    def remove(self) -> None:
        """Removes the part files and their folder."""
        for path in self.folder.glob("*.jsonl"):
            for segment in segments(path):
                segment.unlink()
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            self.folder.rmdir()


class PartWriter:
    """A context manager whose `write` returns when the rows are on the disk."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings

    def __enter__(self) -> PartWriter:
        self._log = LineLog(self.path) if is_remote(self.path) else None
        if self._log is None:
            self._file = self.path.open("ab")
            # Ends a line that an interruption cut off.
            self._file.write(b"\n" if self._file.tell() else b"")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._log is None:
            self._file.close()
        else:
            self._log.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows and waits until they are on the disk."""
        lines = [encode_line({"settings": self.settings} | vars(row)) for row in rows]
        if self._log is not None:
            self._log.append(lines)
            self._log.flush()
            return
        with named_on_error(self.path):
            self._file.writelines(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
