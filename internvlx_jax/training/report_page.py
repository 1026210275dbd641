"""All about a run on one page that stands alone: RUN/report.html (design: training.md 7).

Imports no jax.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.files import read_json_lines, read_run_settings, write_text
from internvlx_jax.training.report import TRAIN, VALIDATION, Series, figure_class, read_metrics
from internvlx_jax.training.store_costs import NAMES, costs

# Panels: title, unit, metrics; one without any of its metrics is left out.
PANELS = (
    ("loss", "cross entropy per token", ("loss", "eval/loss")),
    ("loss by dataset", "cross entropy per token", ("loss_by_dataset/*",)),
    ("learning rate", "", ("learning_rate", "learning_rate/*")),
    ("gradient norm", "before clipping", ("grad_norm", "grad_norm/*")),
    ("update", "of the parameters' norm", ("update_ratio",)),
    ("tokens", "per second", ("useful_tokens_per_s", "supervised_tokens_per_s")),
    ("images and tiles", "per second", ("images_per_s", "tiles_per_s")),
    ("share of the peak", "model FLOPs", ("mfu_padded", "mfu_useful")),
    ("step", "milliseconds", ("step_ms_p50", "step_ms_p95")),
    ("filled", "share of slots", ("token_fill", "tile_fill")),
    ("waiting for data", "share of the time", ("data_wait_share",)),
)
COLORS = (VALIDATION, TRAIN, "#b3541e", "#3d8c5b", "#7a4fa3")
LISTED = 50  # bad steps and bad samples that the page shows
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;
padding:0 1rem;color:#1d2430}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-size:.85rem}
td,th{border-bottom:1px solid #e3e6eb;padding:.2rem .8rem .2rem 0;text-align:left;
vertical-align:top}
img{max-width:100%}.wide{overflow-x:auto}"""


def write_page(run: Path) -> Path:
    """Writes RUN/report.html from the files of the run folder; it appears complete or not at all.

    Raises:
        FileNotFoundError: The run has logged nothing.
        ConfigError: matplotlib is missing, or a file cannot be read.
    """
    series = read_metrics(run / "metrics.jsonl")
    settings = read_run_settings(run)
    bad_steps = read_json_lines(run / "bad_steps.jsonl", "step", "kind", "samples")
    starts = read_json_lines(run / "starts.jsonl", "step", "time")
    bad_samples = [
        row
        for path in sorted(run.glob("quarantine-*.jsonl"))
        for row in read_json_lines(path, "dataset", "line")
    ]
    evaluations = {name: values for name, values in series.items() if name.startswith("eval/")}
    title = f"Run {run.resolve().name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _newest(series),
        f'<h2>Curves</h2><img alt="curves" src="data:image/png;base64,{_curves(series)}">',
        "<h2>Evaluation</h2>",
        _table(("metric", "step", "value", "best", "at step"), _scores(evaluations)),
        "<h2>Starts</h2>",
        _table(
            ("at step", "time", "processes", "devices", "mesh", "code", "versions"),
            (
                (
                    row["step"],
                    row["time"],
                    row.get("processes"),
                    f"{row.get('devices')} x {row.get('device_kind')}",
                    _pairs(row.get("mesh", {})),
                    row.get("git"),
                    _pairs(row.get("versions", {})),
                )
                for row in starts
            ),
        ),
        "<h2>Buckets</h2>",
        _table(
            ("tiles", "slots", "slots of the short layout", "rows"),
            (
                (bucket["tiles"], bucket["length"], bucket["short_length"] or "", bucket["rows"])
                for bucket in (starts[-1].get("buckets", []) if starts else [])
            ),
        ),
        *_store_costs(series, starts, settings),
        f"<h2>Bad steps: {len(bad_steps)}</h2>",
        _table(
            ("step", "kind", "loss", "gradient norm", "bucket", "samples"),
            (
                (
                    row["step"],
                    row["kind"],
                    row.get("loss"),
                    _pairs(row.get("grad_norm", {})),
                    _pairs(row.get("bucket", {})),
                    " ".join(name for names in row["samples"] for name in names),
                )
                for row in bad_steps[-LISTED:]
            ),
        ),
        f"<h2>Bad samples: {len(bad_samples)}</h2>",
        _table(
            ("dataset", "reason", "samples"),
            (
                (*key, count)
                for key, count in Counter(
                    (row["dataset"], row.get("reason")) for row in bad_samples
                ).items()
            ),
        ),
        _table(
            ("dataset", "line", "error"),
            ((row["dataset"], row["line"], row.get("error")) for row in bad_samples[-LISTED:]),
        ),
        "<h2>Settings</h2>",
        _table(("field", "value"), _flat(settings)),
    ]
    out = run / "report.html"
    write_text(
        out,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n",
    )
    return out


def _store_costs(
    series: Mapping[str, Series], starts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[str]:
    """Returns a table of what the run costs in an object store; nothing if it uses none."""
    save_every = settings.get("train", {}).get("save_every", 1)
    if not (found := costs(series, starts, save_every)):
        return []
    head = ("per", *(name.removeprefix("store_").replace("_", " ") for name in NAMES))
    rows = (
        (what.replace("_", ", "), *(values[name] for name in NAMES))
        for what, values in found.items()
    )
    return ["<h2>Object store</h2>", _table(head, rows)]


def _curves(series: Mapping[str, Series]) -> str:
    """Returns all panels as one PNG in base64."""
    panels = [
        (title, unit, found) for title, unit, names in PANELS if (found := _matching(series, names))
    ]
    rows = -(-len(panels) // 2)
    figure = figure_class()(figsize=(11.2, 3.2 * max(rows, 1)), dpi=110, layout="constrained")
    for position, (title, unit, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, position)
        for name, color in zip(names, COLORS):
            points = len(series[name][0])
            axes.plot(
                *series[name],
                color=color,
                linewidth=1.3,
                marker="o" if points < 30 else None,
                markersize=3,
                label=name,
            )
        axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(color="#e3e6eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return base64.b64encode(data.getvalue()).decode()


def _matching(series: Mapping[str, Series], names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        if name.endswith("*"):
            found += [each for each in series if each.startswith(name[:-1])]
        elif name in series:
            found.append(name)
    return found


def _newest(series: Mapping[str, Series]) -> str:
    """Returns a table with the last value of every metric of training."""
    last = max((steps[-1] for steps, _ in series.values()), default=0)
    rows = (
        (name, values[-1]) for name, (_, values) in series.items() if not name.startswith("eval/")
    )
    table = _table(("metric", "last value"), rows)
    return f"<details><summary>At step {last}: all metrics</summary>{table}</details>"


def _scores(evaluations: Mapping[str, Series]) -> Iterable[tuple[Any, ...]]:
    for name, (steps, values) in evaluations.items():
        best = (min if name.endswith("loss") else max)(range(len(values)), key=values.__getitem__)
        yield name, steps[-1], values[-1], values[best], steps[best]


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else name)
    else:
        yield path, json.dumps(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    if not body:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
