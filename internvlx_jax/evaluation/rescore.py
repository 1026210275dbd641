"""Scores the predictions of an earlier job again, without its model (design: evaluation.md 8)."""

from __future__ import annotations

from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.json_text import read_json_file
from internvlx_jax.core.paths import as_path
from internvlx_jax.evaluation.job_config import JudgeConfig
from internvlx_jax.evaluation.records import Summary, read_rows
from internvlx_jax.evaluation.selection import GENERIC, select
from internvlx_jax.evaluation.task_run import TaskRun


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
    summary = task_run.finish(judge.open(path.parent))
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
