"""Draws the learning curves of a run, and puts all that is known of the run on one page.

    internvlx report runs/mine
    internvlx report eval runs/eval/A runs/eval/B

The first form writes curves.png and report.html to the run folder. The second compares the scores
of evaluation jobs; `internvlx report eval --help` says how. Exit status: 0 done, 1 wrong input.
"""

from __future__ import annotations

import argparse
import sys

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.ranges import SHARE, real_number
from internvlx_jax.evaluation.bootstrap import RESAMPLES
from internvlx_jax.evaluation.compare import compare
from internvlx_jax.evaluation.compare_page import write_comparison
from internvlx_jax.evaluation.compare_tables import markdown
from internvlx_jax.training.report import draw_curves
from internvlx_jax.training.report_page import write_page

WORST = 8  # disagreements shown of each task and model


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["eval"] and len(words) > 1:  # alone, it may be a run folder of this name
        return compare_scores(words[1:])
    parser = CommandParser(
        prog="internvlx report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--chance", type=real_number(SHARE), help="exact match without seeing the images, 0 to 1"
    )
    args = parser.parse_args(words)
    configure_logging()

    def draw() -> None:
        run = as_path(args.run)
        print(f"wrote {draw_curves(run, chance=args.chance)}")
        print(f"wrote {write_page(run)}")

    return run_command(draw)


def compare_scores(words: list[str]) -> int:
    """Runs `internvlx report eval` and returns its exit status."""
    parser = CommandParser(
        prog="internvlx report eval",
        description="Compare the scores of evaluation jobs: one table over models and tasks with "
        "95 % bootstrap intervals, paired differences on the same questions, and the questions "
        "that models disagree about most.",
    )
    add = parser.add_argument
    text = "folders of internvlx eval: OUT_DIR, OUT_DIR/MODEL or one task"
    add("dirs", nargs="+", metavar="DIR", help=text)
    text = "receives comparison.md, comparison.csv and comparison.html; the first DIR by default"
    add("--out_dir", help=text)
    add("--baseline", help="model that the others are compared with; the first one by default")
    add("--resamples", type=int, default=RESAMPLES, help="of each interval (%(default)s)")
    add("--seed", type=int, default=0, help="of the resamples (%(default)s)")
    text = "disagreements shown of each task and model (%(default)s)"
    add("--worst", type=int, default=WORST, help=text)
    args = parser.parse_args(words)
    for name, least in (("resamples", 100), ("seed", 0), ("worst", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, it must be at least {least}")
    configure_logging()

    def write() -> None:
        folders = [as_path(each) for each in args.dirs]
        comparison = compare(
            folders, baseline=args.baseline, resamples=args.resamples, seed=args.seed
        )
        written = write_comparison(
            as_path(args.out_dir or args.dirs[0]), comparison, worst=args.worst
        )
        print(markdown(comparison), end="")
        for path in written:
            print(f"wrote {path}")

    return run_command(write)
