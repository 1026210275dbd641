"""One task of a job: its folder, its answers so far, and its score (design: evaluation.md 8, 9).

Files in the folder of a task:

    predictions.jsonl     one object per question, in the order of the data
    summary.json          the score and everything that decides it; its bytes do not depend on the
                          number of devices and processes
    run.json              how it was computed: devices, batches, time, speed
    MODEL_DATASET.xlsx    what VLMEvalKit scores; .tsv where a text does not fit
    submission.*          what the benchmark's server scores
    judge_requests.jsonl  what a judge would have to be asked
    parts/                answers of a job that is not finished
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
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
from internvlx_jax.core.paths import as_path
from internvlx_jax.evaluation.identity import settings_hash
from internvlx_jax.evaluation.job_config import JudgeConfig
from internvlx_jax.evaluation.judge import EndpointJudge, Judge, JudgeError, NoJudge
from internvlx_jax.evaluation.prediction_shards import Parts, read_rows, write_rows
from internvlx_jax.evaluation.records import Row, Summary
from internvlx_jax.evaluation.scoring import Answered, Context, Result
from internvlx_jax.evaluation.selection import TaskSpec
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.tables import write_table
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.requests import GenerationSpec

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
        self.hash = settings_hash(settings)
        self.parts = Parts(folder / "parts", self.hash)
        self.rows = dict(rows or {})
        self.seconds = 0.0

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
                        Row.unscored(number, questions[number], answers[number])
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

    def finish(self, judge: JudgeConfig = JudgeConfig()) -> Summary:
        """Joins the parts, scores them and writes all files.

        Raises:
            ConfigError: answers are missing.
            JudgeError: the judge fails; the files are written as without a judge.
        """
        if self.parts.exist():
            self.rows = self.parts.read()
        missing = sorted(set(range(len(self.spec.questions))) - self.rows.keys())
        if missing or not self.complete:
            raise ConfigError(
                f"{self.folder}: {len(missing)} of {len(self.spec.questions)} answers are missing, "
                f"the first is {missing[:1]}; run all shards, or --resume"
            )
        try:
            return self._write(make_judge(judge, self.folder))
        except JudgeError:
            self._write(NoJudge())
            raise

    def _write(self, judge: Judge) -> Summary:
        spec, rows = self.spec, [self.rows[number] for number in range(len(self.spec.questions))]
        answered = [
            Answered(question, row.raw, row.error)
            for question, row in zip(spec.questions, rows, strict=True)
        ]
        result = spec.protocol_spec.score(answered, Context(judge, spec.compat))
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self._write_tables(rows, result)
        notes = [*spec.notes, *result.notes]
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

    def _write_tables(self, rows: Sequence[Row], result: Result) -> list[str]:
        """Writes the files for VLMEvalKit and for a server; returns their names."""
        spec, files = self.spec.protocol_spec, []
        if not self.spec.generic:
            table = vlmevalkit_rows(self.spec.questions, [row.raw for row in rows])
            files.append(write_table(self.folder / f"{self.model_name}_{spec.dataset}", table).name)
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


def make_judge(config: JudgeConfig, folder: Path) -> Judge:
    """Returns the judge of a task whose folder is `folder`."""
    if config.url is None or config.model is None:
        return NoJudge()
    cache = as_path(config.cache) if config.cache else folder / "judge_cache"
    return EndpointJudge(config.url, config.model, cache)
