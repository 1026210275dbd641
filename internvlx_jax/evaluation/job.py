"""An evaluation job: a checkpoint and tasks -> predictions, scores and a report.

(design: evaluation.md 2, 8, 9) The files of a task lie in OUT_DIR/MODEL/TASK, those of a question
file (--data) in OUT_DIR itself; `task_run` lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.extras import require
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import read_json_file
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.evaluation.identity import checkpoint_hash
from internvlx_jax.evaluation.job_config import EvalConfig, JudgeConfig
from internvlx_jax.evaluation.judge import RequestBudget
from internvlx_jax.evaluation.prediction_shards import read_rows
from internvlx_jax.evaluation.records import CheckpointIdentity, RunInfo, Summary
from internvlx_jax.evaluation.score_table import write_report
from internvlx_jax.evaluation.scoring import ScoringError
from internvlx_jax.evaluation.selection import GENERIC, TaskSpec, generation_spec, select
from internvlx_jax.evaluation.task_run import (
    TaskRun,
    make_judge,
    write_joined,
)
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.loading import load_opened
from internvlx_jax.inference.requests import GenerationSpec
from internvlx_jax.models.sharding import make_mesh

__all__ = ["EvalConfig", "JudgeConfig", "ScoringError", "rescore", "run"]


def run(config: EvalConfig) -> list[Summary]:
    """Answers and scores the tasks of a job.

    Returns:
        The summaries that this process wrote: none with `shard`, and none on other processes than
        the first.

    Raises:
        ConfigError: a setting or a file cannot be used.
        FileNotFoundError: the checkpoint or data files are missing.
        CheckpointError: the checkpoint does not fit its configuration.
        ScoringError: a scorer fails; all answers are written.
    """
    checkpoint = open_checkpoint(config.checkpoint, ema=config.ema)
    tiles = _tiles(config, checkpoint.config.prompt.tiles)
    specs = select(config.selection)
    if not all(spec.generic for spec in specs):  # before hours of answers, not after them
        require("openpyxl", extra="eval", purpose="the table of predictions")
    task_runs = _task_runs(config, checkpoint, tiles, specs)
    generator = None
    if not config.merge and not all(task_run.complete for task_run, _ in task_runs):
        generator = _generator(config, checkpoint, tiles)
    summaries, failures = [], []
    budget = RequestBudget(config.judge.budget)
    for task_run, generation in task_runs:
        if generator is not None:
            task_run.answer(generator, generation, config.shard_of)
        if config.shard is None and jax.process_index() == 0:
            try:
                judge = make_judge(config.judge, task_run.folder, budget)
                summaries.append(task_run.finish(judge))
            except ScoringError as error:  # the other tasks are answered first
                failures.append(error)
            if generator is not None:
                write_json(
                    task_run.folder / "run.json",
                    _run_info(config, generator, task_run.seconds).to_json(),
                )
    if summaries and not all(spec.generic for spec in specs):
        folder = as_path(config.out_dir) / config.model_name
        write_joined(folder, [task_run for task_run, _ in task_runs])
        write_report(folder, summaries)
    if failures:
        raise ScoringError("\n".join(map(str, failures))) from failures[0]
    return summaries


def _task_runs(
    config: EvalConfig, checkpoint: Checkpoint, tiles: TileConfig, specs: Sequence[TaskSpec]
) -> list[tuple[TaskRun, GenerationSpec]]:
    """Returns the tasks of a job with the rows of an earlier run, and how each is asked."""
    identity = CheckpointIdentity(
        checkpoint=config.checkpoint,
        checkpoint_hash=checkpoint_hash(checkpoint.path),
        dtype=config.dtype,
        ema=config.ema,
    )
    out = as_path(config.out_dir)
    task_runs = []
    for spec in specs:
        generation, settings = generation_spec(
            spec, config.selection, checkpoint.config, tiles, config.max_num, config.decoding
        )
        settings = dataclasses.replace(settings, parameters=identity).to_json()
        folder = out if spec.generic else out / config.model_name / spec.task.name
        task_run = TaskRun(spec, folder, config.model_name, settings)
        task_run.recall(resume=config.resume or config.shard is not None or config.merge)
        task_runs.append((task_run, generation))
    return task_runs


def _tiles(config: EvalConfig, tiles: TileConfig) -> TileConfig:
    """Returns the tiling of the checkpoint with the replacements of a job."""
    replaced = {"rule": config.tile_rule, "max_num": config.max_num, "dynamic": config.dynamic}
    return dataclasses.replace(
        tiles, **{name: value for name, value in replaced.items() if value is not None}
    )


def _generator(config: EvalConfig, checkpoint: Checkpoint, tiles: TileConfig) -> BatchGenerator:
    """Loads the model. It is not kept here: on a CPU the generator copies the decoder's layers."""
    mesh = make_mesh(config.mesh)
    pretrained = load_opened(checkpoint, dtype=config.dtype, mesh=mesh)
    if pretrained.tokenizer is None:
        raise ConfigError(
            f"{config.checkpoint} holds no tokenizer; copy the tokenizer files into it"
        )
    processor = Processor.for_model(
        pretrained.config, pretrained.tokenizer, special_text="escape", tiles=tiles
    )
    return BatchGenerator(pretrained.model, processor, mesh, batch_size=config.batch_size)


def _run_info(config: EvalConfig, generator: BatchGenerator, seconds: float) -> RunInfo:
    return RunInfo(
        config=to_dict(config),
        seconds=seconds,
        processes=jax.process_count(),
        devices=f"{generator.mesh.size} x {jax.devices()[0].device_kind}",
        rows=generator.rows,
        executables=generator.executables,
        speed=generator.speed.report(),
    )


def rescore(
    predictions: str,
    *,
    data_root: str = "data",
    tsv_root: str | None = None,
    compat: str | None = None,
    judge: JudgeConfig = JudgeConfig(),
) -> Summary:
    """Scores a predictions.jsonl again, without the model; the data of its task are needed.

    Args:
        predictions: the file; the summary.json beside it says what was asked.
        data_root, tsv_root: where the data lie.
        compat: deviations of the scorers; None takes those of the summary.
        judge: who grades what rules cannot decide.

    Raises:
        FileNotFoundError: predictions.jsonl, its summary.json or the data are missing.
        ConfigError: the predictions do not belong to the data.
        ScoringError: the scorer fails.
        JudgeError: the judge fails; the files say that the task is pending.
    """
    path = as_path(predictions)
    rows = read_rows(path)
    old = _read_summary(path)
    (spec,) = select(_selection(old, data_root, tsv_root, compat))
    if len(rows) != len(spec.questions):
        raise ConfigError(
            f"{path}: {len(rows)} rows, but the data hold {len(spec.questions)} questions"
        )
    for row, question in zip(rows, spec.questions, strict=True):
        if row.question_id != question.id or row.prompt != question.prompt:
            raise ConfigError(
                f"{path}: row {row.index} is not the question at {question.where}; the data have "
                "changed"
            )
    by_index = {row.index: row for row in rows}
    task_run = TaskRun(spec, path.parent, old.model, old.settings, by_index)
    summary = task_run.finish(make_judge(judge, path.parent))
    if task_run.gone is not None:
        raise task_run.gone
    return summary


def _read_summary(predictions: Path) -> Summary:
    path = predictions.parent / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; --rescore needs it beside predictions.jsonl"
        )
    return Summary.from_json(read_json_file(path, remedy="run eval.py again"), str(path))


def _selection(
    old: Summary, data_root: str, tsv_root: str | None, compat: str | None
) -> EvaluationConfig:
    """Returns the selection of the task that a summary is about."""
    settings = old.settings
    if settings["protocol"] == GENERIC:
        asked = {name: settings[name] for name in ("data", "metric", "image_root", "prompt")}
    else:
        asked = {"tasks": settings["task"], "protocol": settings["protocol"]}
    return EvaluationConfig(
        **asked,
        data_root=data_root,
        tsv_root=tsv_root,
        limit=settings["limit"],
        compat=compat or ",".join(old.compat) or "none",
        cot=settings.get("cot", False),
        frames=settings.get("frames"),
    )
