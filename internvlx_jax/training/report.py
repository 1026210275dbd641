"""Learning curves of a run: RUN/metrics.jsonl to RUN/curves.png (design: training.md 7).

Imports no jax. `internvlx report RUN_DIR` draws them, and RUN/report.html (report_page.py).
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
    """Reads metrics.jsonl.

    A last line without its end is one that a running or killed run has not finished; it is left
    out.

    Returns:
        (steps, values) of each metric, in the order of the file.

    Raises:
        FileNotFoundError: The run has logged nothing.
        ConfigError: A line cannot be read; names the line.
    """
    if not path.exists():
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
    """Draws RUN/curves.png: loss in training and validation, and exact match if it was measured.

    Args:
        run: Run folder.
        chance: Exact match without seeing the images, 0 to 1; drawn as a line.

    Returns:
        The path of the picture, which appears complete or not at all.

    Raises:
        FileNotFoundError: The run has logged nothing.
        ConfigError: It has logged no loss, or matplotlib is missing.
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
    _finish(loss, "loss", "cross entropy per token")
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
    """Returns matplotlib's Figure, which needs no display; raises ConfigError without it."""
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
