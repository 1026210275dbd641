"""The report of a run: RUN/metrics.jsonl -> RUN/curves.png, and RUN/report.html (design: training.md 7). No import of jax.

python -m internvlx_jax.training.report RUN_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_json_lines, written_aside

Series = tuple[list[int], list[float]]

TRAIN, VALIDATION, CHANCE = "#8a94a6", "#1f5fbf", "#b3541e"
POINTS = dict(color=VALIDATION, linewidth=1.8, marker="o", markersize=4, label="validation")


def read_metrics(path: Path) -> dict[str, Series]:
    """Name of each metric -> (steps, values), in the order of the file.

    A last line without its end is one that a running or killed run has not finished; it is left out. Raises
    FileNotFoundError, or ConfigError naming the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the output_dir of a run that has logged a step"
        )
    series: dict[str, Series] = {}
    for row in read_json_lines(path, "step"):
        step = row.pop("step")
        for name, value in row.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return series


def draw_curves(run: Path, *, chance: float | None = None) -> Path:
    """Draw RUN/curves.png: training and validation loss, and validation exact match if there is any.

    chance: exact match without seeing the images, 0..1; drawn as a line. Returns the path of the picture,
    which appears complete or not at all. Raises FileNotFoundError, and ConfigError without matplotlib or
    without a loss.
    """
    series = read_metrics(run / "metrics.jsonl")
    if "loss" not in series:
        raise ConfigError(
            f'{run / "metrics.jsonl"} holds no "loss" yet; wait for the first logged step'
        )
    exact = series.get("eval/exact")
    panels = 2 if exact else 1
    figure = figure_class()(figsize=(5.6 * panels, 3.8), dpi=150, layout="constrained")
    figure.suptitle(run.as_posix(), fontsize=11)
    axes = figure.subplots(1, panels, squeeze=False)[0]

    loss = axes[0]
    loss.plot(*series["loss"], color=TRAIN, linewidth=1.4, label="training")
    if "eval/loss" in series:
        loss.plot(*series["eval/loss"], **POINTS)
    _finish(loss, "loss", "cross entropy a token")
    loss.set_ylim(bottom=0)

    if exact:
        match = axes[1]
        match.plot(*exact, **POINTS)
        steps, values = exact
        match.annotate(
            f"{100 * values[-1]:.1f} %",
            (steps[-1], values[-1]),
            xytext=(-4, 8),
            textcoords="offset points",
            ha="right",
            color=VALIDATION,
            fontweight="bold",
        )
        if chance is not None:
            label = f"chance, {100 * chance:.1f} %"
            match.axhline(chance, color=CHANCE, linewidth=1.2, linestyle="--", label=label)
        _finish(match, "exact match", "share of answers")
        match.set_ylim(0, 1.12)
        match.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])

    out = run / "curves.png"
    with written_aside(out) as aside:
        figure.savefig(aside, format="png")
    return out


def figure_class() -> type[Any]:
    """matplotlib's Figure, which saves PNG files with Agg and needs no display. ConfigError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "drawing curves needs matplotlib; pip install 'internvlx-jax[report]'"
        ) from None
    return Figure


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_xlim(left=0)
    axes.grid(color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


if __name__ == "__main__":
    from internvlx_jax.cli.report import main

    sys.exit(main())
