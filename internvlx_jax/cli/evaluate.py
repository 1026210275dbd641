"""The command line of eval.py and `internvlx eval` (design: evaluation.md 2).

DIR is a Hugging Face folder or a run folder of train.py. Exit status: 0 done, 1 wrong input, 2
wrong flags, 3 some questions failed (they count as wrong, and predictions.jsonl says why), 4 the
judge that was given gave no more replies (its tasks are pending). jax is loaded when a job begins,
so that --help and --list answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.evaluation_config import PROTOCOLS, EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.core.tile_config import TILE_RULES
from internvlx_jax.evaluation.job_config import Decoding, EvalConfig, JudgeConfig
from internvlx_jax.evaluation.judge import KEY_VARIABLE, JudgeError
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.records import Summary
from internvlx_jax.evaluation.score_table import markdown
from internvlx_jax.evaluation.scoring import COMPAT, ScoringError
from internvlx_jax.evaluation.selection import ACCEPTANCE, GENERIC, RELEASE
from internvlx_jax.evaluation.sources import Roots
from internvlx_jax.evaluation.tasks import SUITES, TASKS
from internvlx_jax.training import distributed


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command; a flag that is not given is not in its namespace."""
    parser = CommandParser(
        prog="internvlx eval",
        description="Score a checkpoint on benchmarks or on a question file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_selection(parser)
    _add_model(parser)
    _add_job(parser)
    for axis in dataclasses.fields(MeshConfig):
        text = "devices along this mesh axis"
        parser.add_argument(f"--mesh_{axis.name}", type=int, default=axis.default, help=text)
    distributed.add_flags(parser)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is asked."""
    add = parser.add_argument
    add("--tasks", help="benchmarks by name, with commas between them; --list shows them")
    add("--suite", choices=sorted(SUITES), help="a named set of benchmarks")
    text = "whose prompts, data files and metrics; the task's own by default"
    add("--protocol", choices=PROTOCOLS, help=text)
    add("--data_root", default="data", help="InternVL's data folder (%(default)s)")
    add("--tsv_root", help="folder of the TSV files; DATA_ROOT/tsv by default")
    add("--data", help="questions: JSONL with question, answer, image, question_id")
    add("--metric", choices=sorted(METRICS), help="metric of --data")
    add("--image_root", help="folder of the image paths of --data; that of the file by default")
    add("--prompt", help="how --data is asked, with {question} in it")
    add("--limit", type=int, help="only the first questions")
    text = "ask for a chain of thought where a task has such a prompt, and read its final answer"
    add("--cot", action="store_true", help=text)
    add("--frames", type=int, help="frames per video; the task's own by default")
    listed = ", ".join(COMPAT)
    text = f"deviations of published scripts: {listed}; {ACCEPTANCE}, {RELEASE} or none"
    add("--compat", help=text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say who is asked, and how."""
    add = parser.add_argument
    add("--checkpoint", help="Hugging Face folder, run folder, or RUN/checkpoints/STEP")
    add("--ema", action="store_true", help="a run's average of parameters (optimizer.ema_decay)")
    add("--dtype", choices=("bfloat16", "float32"), help="of parameters and activations (bfloat16)")
    add("--tile_rule", choices=TILE_RULES, help="the checkpoint's by default")
    add("--max_num", type=int, help="most tiles per image; the checkpoint's by default")
    add("--dynamic", action="store_true", help="cut tiles, whatever the checkpoint says")
    no_dynamic = ("--no_dynamic", "--no-dynamic")
    text = "squash every image into one tile"
    add(*no_dynamic, dest="dynamic", action="store_false", help=text)
    add("--batch_size", type=int, help="rows per batch (16)")
    add("--max_new_tokens", type=int, help="the task's by default")
    add("--temperature", type=float, help="0 (default) takes the most likely token")
    add("--top_k", type=int, help="sample from the k best tokens")
    text = "sample from the best tokens whose probabilities add up to this"
    add("--top_p", type=float, help=text)
    add("--repetition_penalty", type=float, help="above 1, tokens of the text become less likely")
    add("--seed", type=int, help="of the sampling (0)")
    text = "text that ends an answer; may be given several times"
    add("--stop_string", action="append", help=text)


def _add_job(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the job itself."""
    add = parser.add_argument
    add("--out_dir", default="runs/eval", help="receives predictions, summaries and the report")
    add("--resume", action="store_true", help="go on with an interrupted job")
    add("--rescore", metavar="FILE", help="score a predictions.jsonl again, without the model")
    text = "answer only this share of the questions, without communication"
    add("--shard", metavar="I/N", help=text)
    add("--merge", action="store_true", help="join the shards of a job and score them")
    text = f"OpenAI-compatible endpoint of a judge; the key is read from {KEY_VARIABLE}"
    add("--judge_url", help=text)
    add("--judge_model", help="model to ask there")
    text = "folder of its replies; judge_cache in the folder of the task by default"
    add("--judge_cache", help=text)
    add("--judge_concurrency", type=int, help="requests to the judge at a time (8)")
    add("--judge_retries", type=int, help="most tries per request (5), with growing pauses")
    text = "most requests to the judge in this job; tasks that need more stay pending"
    add("--judge_budget", type=int, help=text)
    add("--allow_errors", action="store_true", help="exit with 0 although some questions failed")
    add("--list", action="store_true", help="show all tasks and whether their data are available")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    configure_logging()
    flags = parser()
    args = vars(flags.parse_args(argv))
    if args.get("list"):
        print(list_tasks(as_path(args["data_root"]), args.get("tsv_root")))
        return 0
    if not ({"checkpoint", "rescore"} & args.keys()):
        flags.error("--checkpoint is required")

    def score() -> int:
        summaries = _score(args)
        rescored = args.get("rescore")
        place = str(as_path(rescored).parent) if rescored else args["out_dir"]
        _print_scores(summaries, place)
        if any(summary.errors for summary in summaries) and not args.get("allow_errors"):
            return 3
        pending = any(summary.judge == "pending" for summary in summaries)
        return 4 if pending and "judge_url" in args else 0

    words = "interrupted; the answers so far are kept, and --resume goes on with them"
    return run_command(score, JudgeError, ScoringError, interrupted=words)


def _score(args: Mapping[str, Any]) -> list[Summary]:
    """Runs the job of the flags; this is where jax is loaded."""
    from internvlx_jax.evaluation import job
    from internvlx_jax.evaluation.rescore import rescore
    from internvlx_jax.training.peers import ending_together

    flags = {field.name: f"judge_{field.name}" for field in dataclasses.fields(JudgeConfig)}
    judge = JudgeConfig(**_take(args, JudgeConfig, **flags))
    if "rescore" in args:
        chosen = {name: args[name] for name in ("data_root", "tsv_root", "compat") if name in args}
        return [rescore(args["rescore"], **chosen, judge=judge)]
    if not ({"shard", "merge"} & args.keys()):  # these work without the other processes
        configure_logging(distributed.start_from(argparse.Namespace(**args)))
    axes = {axis.name: args[f"mesh_{axis.name}"] for axis in dataclasses.fields(MeshConfig)}
    decoding = Decoding(
        sampling=Sampling(**_take(args, Sampling)),
        seed=args.get("seed", 0),
        stop_strings=tuple(args.get("stop_string", ())),
    )
    config = EvalConfig(
        **_take(args, EvalConfig),
        selection=EvaluationConfig(**_take(args, EvaluationConfig)),
        decoding=decoding,
        judge=judge,
        mesh=MeshConfig(**axes),
    )
    with ending_together():
        return job.run(config)


def _take(args: Mapping[str, Any], cls: Any, **renamed: str) -> dict[str, Any]:
    """Returns the fields of a dataclass that are among the flags, under their or another name."""
    names = {field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(cls)}
    return {name: args[flag] for name, flag in names.items() if flag in args}


def _print_scores(summaries: list[Summary], out_dir: str) -> None:
    """Prints the table of benchmarks and a line per task."""
    if any(summary.protocol != GENERIC for summary in summaries):
        print(markdown(summaries), end="")
    for summary in summaries:
        score = "no score" if summary.score is None else f"{summary.score:.4f}"
        name = summary.settings.get("metric") or summary.task
        print(
            f"{name} {score} on {summary.samples} samples, {summary.errors} errors; see {out_dir}"
        )


def list_tasks(data_root: Path, tsv_root: str | None) -> str:
    """Returns one line per task and protocol, the default protocol first."""
    roots = Roots(data_root, as_path(tsv_root) if tsv_root else data_root / "tsv")
    rows = [("task", "protocol", "questions", "data", "title")]
    for task in TASKS.values():
        for protocol, spec in task.protocols.items():
            missing = spec.source.missing(roots)
            data = f"{len(missing)} missing, e.g. {missing[0]}" if missing else "available"
            rows.append((task.name, protocol, str(task.samples or "-"), data, task.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
