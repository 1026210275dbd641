"""The scores of a job as tables for people, in Markdown and CSV (design: evaluation.md 8)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.files import write_text
from internvlx_jax.evaluation.records import Summary
from internvlx_jax.evaluation.tasks import GROUPS

COLUMNS: tuple[str, ...] = (
    "task",
    "protocol",
    "score",
    "samples",
    "errors",
    "cut off",
    "tiles",
    "judge",
    "notes",
)


def table_rows(summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """Returns one row per task, and one for the mean of each complete group."""
    rows = [_row(summary) for summary in summaries]
    for group, members in GROUPS.items():
        found = [
            summary
            for summary in summaries
            if summary.task in members and summary.score is not None
        ]
        if len(found) == len(members) and len({summary.protocol for summary in found}) == 1:
            mean = sum(summary.score or 0.0 for summary in found) / len(found)
            rows.append(
                dict.fromkeys(COLUMNS, "")
                | {
                    "task": f"{group} (mean)",
                    "protocol": found[0].protocol,
                    "score": _number(mean),
                    "samples": str(sum(summary.samples for summary in found)),
                }
            )
    return rows


def markdown(summaries: Sequence[Summary]) -> str:
    """Returns the table in Markdown."""
    rows = table_rows(summaries)
    lines = [" | ".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    lines += [
        " | ".join(row[column].replace("|", "\\|").replace("\n", " ") for column in COLUMNS)
        for row in rows
    ]
    return "".join(f"| {line} |\n" for line in lines)


def write_report(folder: Path, summaries: Sequence[Summary]) -> None:
    """Writes report.md and report.csv."""
    write_text(folder / "report.md", markdown(summaries))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows(summaries))
    write_text(folder / "report.csv", text.getvalue())


def _row(summary: Summary) -> dict[str, str]:
    tiles = summary.settings["tiles"]
    rule = f"{tiles['rule']} {tiles['max_num']}" if tiles["dynamic"] else "one tile"
    judge = summary.judge
    return {
        "task": summary.task,
        "protocol": summary.protocol,
        "score": "pending" if judge == "pending" else _number(summary.score),
        "samples": str(summary.samples),
        "errors": str(summary.errors),
        "cut off": str(summary.stopped_by_length),
        "tiles": rule,
        "judge": _judge(judge),
        "notes": "; ".join(summary.notes),
    }


def _judge(judge: Mapping[str, Any] | str | None) -> str:
    if judge is None or isinstance(judge, str):
        return judge or ""
    return str(judge["model"])


def _number(score: float | None) -> str:
    if score is None:
        return "-"
    return f"{score:.4f}" if abs(score) <= 1 else f"{score:.2f}"
