"""The tables of predictions that VLMEvalKit scores, and the files for servers.

(design: evaluation.md 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvlx_jax.evaluation.scoring import Result
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.tables import write_table
from internvlx_jax.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from internvlx_jax.evaluation.task_run import TaskRun


def table_rows(task_run: TaskRun) -> list[dict[str, Any]]:
    """Returns the rows of the table of a task."""
    spec = task_run.spec
    texts = task_run.texts(task_run.ordered_rows())
    return vlmevalkit_rows(spec.questions, texts, spec.protocol_spec.table)


def write_tables(task_run: TaskRun, result: Result) -> list[str]:
    """Writes the files of a task for VLMEvalKit and for a server; returns their names."""
    spec, files = task_run.spec.protocol_spec, []
    if not task_run.spec.generic and spec.dataset and not spec.joined:
        path = task_run.folder / f"{task_run.model_name}_{spec.dataset}"
        files.append(write_table(path, table_rows(task_run)).name)
    if spec.submission is not None:
        questions = task_run.spec.questions
        files.append(spec.submission(task_run.folder, questions, result.predictions).name)
    return files


def write_joined(folder: Path, task_runs: Sequence[TaskRun]) -> list[Path]:
    """Writes the table of each dataset that several tasks share, if all of them are answered.

    Args:
        folder: folder of the tables.
        task_runs: tasks of a job.

    Returns:
        The files written.
    """
    written = []
    for task_run in task_runs:
        spec = task_run.spec
        dataset = spec.protocol_spec.dataset
        if spec.generic or not spec.protocol_spec.joined or not dataset:
            continue
        runs = [
            run
            for run in task_runs
            if run.complete
            and run.spec.protocol == spec.protocol
            and run.spec.protocol_spec.dataset == dataset
        ]
        parts = [
            task
            for task in TASKS.values()
            if spec.protocol in task.protocols and task.protocols[spec.protocol].dataset == dataset
        ]
        if runs[:1] == [task_run] and len(runs) == len(parts):
            rows = [row for run in runs for row in table_rows(run)]
            if len({row["index"] for row in rows}) < len(rows):  # row numbers of separate files
                rows = [row | {"index": i} for i, row in enumerate(rows)]
            rows.sort(key=lambda row: row["index"] if isinstance(row["index"], int) else 0)
            written.append(write_table(folder / f"{task_run.model_name}_{dataset}", rows))
    return written
