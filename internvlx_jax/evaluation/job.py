"""An evaluation job: a checkpoint and tasks -> predictions, scores and a report (design: evaluation.md 2, 8, 9).

The files of a task lie in OUT_DIR/MODEL/TASK, those of a question file (--data) in OUT_DIR itself:

    predictions.jsonl     one object a question, in the order of the data
    summary.json          the score and all that decides it; the same bytes on any number of devices and processes
    run.json              how it was computed: devices, batches, time, speed
    MODEL_DATASET.xlsx    what VLMEvalKit scores (.tsv where a text does not fit); submission.*, judge_requests.jsonl
    parts/                answers of a job that is not finished
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.files import write_json
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.evaluation.identity import checkpoint_hash, settings_hash
from internvlx_jax.evaluation.judge import EndpointJudge, Judge, JudgeError, NoJudge
from internvlx_jax.evaluation.prediction_shards import Parts, Row, read_rows, write_rows
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.score_table import write_report
from internvlx_jax.evaluation.scoring import Answered, Context, Result
from internvlx_jax.evaluation.selection import GENERIC, Decoding, TaskSpec, generation_spec, select
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.tables import write_table
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.loading import load_pretrained
from internvlx_jax.inference.requests import Answer, GenerationSpec
from internvlx_jax.models.sharding import make_mesh

LIBRARIES = ("internvlx-jax", "jax", "flax", "numpy", "pillow", "sentencepiece")

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """An OpenAI-compatible endpoint; without a URL judged benchmarks write their requests and stay pending."""

    url: str | None = None
    model: str | None = None
    cache: str | None = None

    def __post_init__(self):
        if (self.url is None) != (self.model is None):
            raise ConfigError(
                "judge_url and judge_model belong together: the endpoint and the model to ask there"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of a job; None takes the checkpoint's own.

    Attributes:
        ema: of a run folder, take the average of the trained parameters.
        tile_rule, max_num, dynamic: replace the checkpoint's tiling.
        resume: go on with an interrupted job; without it unfinished answers in out_dir are an error.
        shard: "i/n": answer only every n-th question from i on, on its own; `merge` joins the shards of a job.
    """

    checkpoint: str
    out_dir: str
    selection: EvaluationConfig
    ema: bool = False
    tile_rule: str | None = None
    max_num: int | None = None
    dynamic: bool | None = None
    batch_size: int = 16
    dtype: str = "bfloat16"
    decoding: Decoding = Decoding()
    judge: JudgeConfig = JudgeConfig()
    mesh: MeshConfig = MeshConfig()
    resume: bool = False
    shard: str | None = None
    merge: bool = False

    def __post_init__(self):
        for name in ("max_num", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, it must be at least 1")
        self.shard_of()

    def shard_of(self) -> tuple[int, int]:
        """(i, n) of `shard`, (0, 1) without one."""
        if self.shard is None:
            return 0, 1
        try:
            i, n = map(int, self.shard.split("/"))
        except ValueError:
            i, n = -1, 0
        if not 0 <= i < n:
            raise ConfigError(f"shard is {self.shard!r}; give i/n with 0 <= i < n, such as 0/4")
        return i, n

    @property
    def model_name(self) -> str:
        path = Path(self.checkpoint).resolve()
        name = (
            f"{path.parents[1].name}-{path.name}"
            if path.parent.name == "checkpoints"
            else path.name
        )
        return f"{name}-ema" if self.ema else name

    def folder(self, unit: TaskSpec) -> Path:
        out = Path(self.out_dir)
        return out if unit.generic else out / self.model_name / unit.task.name


def run(config: EvalConfig) -> list[Summary]:
    """Answer and score; returns the summaries written, which with `shard` and on other processes than the first are
    none. Raises ConfigError, FileNotFoundError, CheckpointError or JudgeError."""
    source = open_checkpoint(config.checkpoint, ema=config.ema)
    overrides = {"rule": config.tile_rule, "max_num": config.max_num, "dynamic": config.dynamic}
    tiles = dataclasses.replace(
        source.config.prompt.tiles, **{k: v for k, v in overrides.items() if v is not None}
    )
    units = select(config.selection)
    stored = (
        RunFolder(config.checkpoint).path
        if RunFolder.is_one(Path(config.checkpoint))
        else Path(config.checkpoint)
    )
    model = {
        "checkpoint": config.checkpoint,
        "checkpoint_hash": checkpoint_hash(stored),
        "dtype": config.dtype,
    }
    if config.ema:
        model["ema"] = True
    desks = []
    for unit in units:
        asking, settings = generation_spec(
            unit, config.selection, source.config, tiles, config.max_num, config.decoding
        )
        desks.append(
            TaskRun(unit, config.folder(unit), config.model_name, settings | model, asking)
        )
    for desk in desks:
        desk.recall(resume=config.resume or config.shard is not None or config.merge)

    answerer = None
    if not config.merge and not all(desk.complete for desk in desks):
        mesh = make_mesh(config.mesh)
        pretrained = load_pretrained(
            config.checkpoint, dtype=config.dtype, mesh=mesh, ema=config.ema
        )
        if pretrained.tokenizer is None:
            raise ConfigError(
                f"{config.checkpoint} holds no tokenizer.model; copy the tokenizer files into it"
            )
        processor = Processor.for_model(
            pretrained.config, pretrained.tokenizer, special_text="escape", tiles=tiles
        )
        answerer = BatchGenerator(pretrained.model, processor, mesh, batch_size=config.batch_size)
        del pretrained  # on a CPU the answerer has its own copy of the layers

    summaries = []
    for desk in desks:
        if answerer is not None:
            desk.answer(answerer, config.shard_of())
        if config.shard is None and jax.process_index() == 0:
            summaries.append(desk.finish(config.judge))
            if answerer is not None:
                write_json(desk.folder / "run.json", how(config, answerer, desk))
    if any(not desk.unit.generic for desk in desks) and summaries:
        write_report(Path(config.out_dir) / config.model_name, summaries)
    return summaries


def rescore(
    predictions: str,
    *,
    data_root: str = "data",
    tsv_root: str | None = None,
    compat: str | None = None,
    judge: JudgeConfig = JudgeConfig(),
) -> Summary:
    """Score a predictions.jsonl again, without the model; the task's data have to be there.

    What was asked is what the summary.json beside it says; so is `compat` if it is None.
    """
    path = Path(predictions)
    rows = read_rows(path)
    try:
        old = json.loads((path.parent / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent / 'summary.json'} does not exist; --rescore needs it beside "
            "predictions.jsonl"
        ) from None
    settings = old["settings"]
    generic = settings["protocol"] == GENERIC
    what = {name: settings[name] for name in ("data", "metric", "image_root", "prompt")} if generic else {
        "tasks": settings["task"], "protocol": settings["protocol"]}  # fmt: skip
    (unit,) = select(
        EvaluationConfig(
            **what,
            data_root=data_root,
            tsv_root=tsv_root,
            limit=settings["limit"],
            compat=compat or ",".join(old["compat"]) or "none",
        )
    )
    if len(rows) != len(unit.questions):
        raise ConfigError(
            f"{path}: {len(rows)} rows, but the data hold {len(unit.questions)} questions"
        )
    for row, question in zip(rows, unit.questions):
        if row["question_id"] != question.id or row["prompt"] != question.prompt:
            raise ConfigError(
                f"{path}: row {row['index']} is not the question at {question.where}; the data have "
                "changed"
            )
    desk = TaskRun(unit, path.parent, old["model"], settings)
    desk.rows = {row["index"]: row for row in rows}
    return desk.finish(judge)


class TaskRun:
    """One task of a job: its folder, its answers so far, its score."""

    def __init__(
        self,
        unit: TaskSpec,
        folder: Path,
        model_name: str,
        settings: dict[str, Any],
        asking: GenerationSpec | None = None,
    ):
        self.unit, self.folder, self.model_name, self.settings = unit, folder, model_name, settings
        self.asking = asking
        self.hash = settings_hash(settings)
        self.parts = Parts(folder / "parts", self.hash)
        self.rows: dict[int, Row] = {}
        self.seconds = 0.0

    @property
    def complete(self) -> bool:
        return len(self.rows) == len(self.unit.questions)

    def recall(self, *, resume: bool) -> None:
        """Take over the rows of an earlier run. Raises ConfigError when there are some and `resume` is not set."""
        summary, predictions = self.folder / "summary.json", self.folder / "predictions.jsonl"
        if self.parts.exist():
            if not resume:
                raise ConfigError(
                    f"{self.parts.folder} holds answers of an unfinished job; --resume goes on with "
                    "them, or remove the folder"
                )
            self.rows = self.parts.read()
        elif resume and summary.is_file() and predictions.is_file():
            if json.loads(summary.read_text(encoding="utf-8"))["settings_hash"] == self.hash:
                self.rows = {row["index"]: row for row in read_rows(predictions)}

    def answer(self, answerer: BatchGenerator, shard: tuple[int, int] = (0, 1)) -> None:
        """Answer what is not finished, into part files; all processes call this alike."""
        questions = self.unit.questions
        done = np.zeros(len(questions), np.int32)
        done[sorted(self.rows)] = 1
        if jax.process_count() > 1:  # the first process decides, so that all have the same batches
            done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        i, n = shard
        open_ = {
            number: questions[number]
            for number in np.flatnonzero(done == 0).tolist()
            if number % n == i
        }
        if not open_:
            return
        begun = time.perf_counter()
        with (
            self.parts.writer(f"{i}of{n}-process{jax.process_index()}") as part,
            tqdm(
                total=len(open_),
                desc=self.unit.task.name,
                unit="answer",
                disable=jax.process_index() > 0,
            ) as bar,
        ):
            requests = {number: question.request for number, question in open_.items()}
            for answers in answerer.answer(requests, self.asking):
                part.write(
                    {
                        number: raw_row(number, questions[number], answer)
                        for number, answer in answers.items()
                    }
                )
                bar.update(min(len(answers) * jax.process_count(), len(open_) - bar.n))
        self.seconds = time.perf_counter() - begun
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.folder} answered")

    def finish(self, judge: JudgeConfig = JudgeConfig()) -> Summary:
        """Join the parts, score, write all files. Raises ConfigError when answers are missing, or JudgeError."""
        if self.parts.exist():
            self.rows = self.parts.read()
        missing = sorted(set(range(len(self.unit.questions))) - self.rows.keys())
        if missing or not self.complete:
            raise ConfigError(
                f"{self.folder}: {len(missing)} of {len(self.unit.questions)} answers are missing, the "
                f"first is {missing[:1]}; run all shards, or --resume"
            )
        try:
            return self._write(make_judge(judge, self.folder))
        except JudgeError:
            self._write(NoJudge())
            raise

    def _write(self, judge: Judge) -> Summary:
        unit, rows = self.unit, [self.rows[number] for number in range(len(self.unit.questions))]
        answered = [
            Answered(question, row["raw"], row["error"])
            for question, row in zip(unit.questions, rows)
        ]
        result = unit.protocol_spec.score(answered, Context(judge, unit.compat))
        self.folder.mkdir(parents=True, exist_ok=True)
        files = []
        if not unit.generic:
            table = vlmevalkit_rows(unit.questions, [row["raw"] for row in rows])
            files.append(
                write_table(
                    self.folder / f"{self.model_name}_{unit.protocol_spec.dataset}", table
                ).name
            )
        if unit.protocol_spec.submission is not None:
            files.append(
                unit.protocol_spec.submission(self.folder, unit.questions, result.predictions).name
            )
        notes = [*unit.notes, *result.notes]
        requests = self.folder / "judge_requests.jsonl"
        requests.unlink(missing_ok=True)
        if isinstance(judge, NoJudge) and judge.requests:
            judge.write(requests)
            files.append(requests.name)
            notes.append(
                f"{len(judge.requests)} requests to a judge are in {requests.name}; --rescore with --judge_url "
                "asks them"
            )
        write_rows(
            self.folder / "predictions.jsonl",
            [
                row | {"prediction": prediction, "score": score}
                for row, prediction, score in zip(
                    rows, result.predictions, result.scores, strict=True
                )
            ],
        )
        summary = self._summary(result, rows, notes, files, judge)
        write_json(self.folder / "summary.json", summary)
        self.parts.remove()
        return summary

    def _summary(
        self, result: Result, rows: Sequence[Row], notes: list[str], files: list[str], judge: Judge
    ) -> Summary:
        unit = self.unit
        return {
            "task": unit.task.name, "title": unit.task.title, "protocol": unit.protocol, "model": self.model_name,
            "score": result.score, "parts": dict(result.parts), "samples": len(rows),
            "errors": sum(row["finish"] == "error" for row in rows),
            "stopped_by_length": sum(row["finish"] == "length" for row in rows),
            "notes": notes, "judge": "pending" if result.pending else judge.describe(), "compat": sorted(unit.compat),
            "files": files, "settings": self.settings, "settings_hash": self.hash,
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }  # fmt: skip


def raw_row(number: int, question: Question, answer: Answer) -> Row:
    """What is known before scoring; `prediction` and `score` are filled in then."""
    return {
        "index": number,
        "question_id": question.id,
        "prompt": question.prompt,
        "images": [str(image) for image in question.images],
        "tiles": answer.tiles,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "finish": answer.finish,
        "raw": answer.text,
        "prediction": None,
        "answer": list(question.answers),
        "score": None,
        "error": None if answer.error is None else str(answer.error),
    }


def make_judge(config: JudgeConfig, folder: Path) -> Judge:
    if config.url is None:
        return NoJudge()
    return EndpointJudge(
        config.url, config.model, Path(config.cache) if config.cache else folder / "judge_cache"
    )


def how(config: EvalConfig, answerer: BatchGenerator, desk: TaskRun) -> dict[str, Any]:
    """What does not change the result: where and how fast it was computed; speeds are those of the job so far."""
    return {
        "config": to_dict(config), "seconds": desk.seconds, "processes": jax.process_count(),
        "devices": f"{answerer.mesh.size} x {jax.devices()[0].device_kind}", "rows": answerer.rows,
        "executables": answerer.executables, "speed": answerer.speed.report(),
    }  # fmt: skip
