"""The command line of eval.py (design: evaluation.md 2).

DIR is a Hugging Face folder or a run folder of train.py. Exit status: 0 done, 1 wrong input, 2 wrong flags, 3 some
questions failed (they count as wrong, and predictions.jsonl says why).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NoReturn

from internvlx_jax.core.errors import CheckpointError, ConfigError, SampleError, did_you_mean
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.core.tile_config import TILE_RULES
from internvlx_jax.evaluation.job import EvalConfig, JudgeConfig, rescore, run
from internvlx_jax.evaluation.judge import KEY_VARIABLE, JudgeError
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.score_table import markdown
from internvlx_jax.evaluation.scoring import COMPAT
from internvlx_jax.evaluation.selection import ACCEPTANCE, Decoding
from internvlx_jax.evaluation.sources import Roots
from internvlx_jax.evaluation.tasks import PROTOCOLS, SUITES, TASKS
from internvlx_jax.training import distributed


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag when one is unknown."""

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(
                f"unknown argument {unknown[0]}.{did_you_mean(unknown[0].split('=')[0], flags)}"
            )
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eval.py",
        description="Score a checkpoint on benchmarks or on a question file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="Hugging Face folder, run folder, or RUN/checkpoints/STEP")
    add("--out_dir", default="runs/eval", help="receives predictions, summaries and the report")
    add("--tasks", help="benchmarks by name, with commas between them; --list shows them")
    add("--suite", choices=sorted(SUITES), help="a named set of benchmarks")
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="whose prompts, data files and metrics; the task's own by default",
    )
    add("--data_root", default="data", help="InternVL's data folder (%(default)s)")
    add("--tsv_root", help="folder of the TSV files; DATA_ROOT/tsv by default")
    add("--data", help="questions: JSONL with question, answer, image, question_id")
    add("--metric", choices=sorted(METRICS), help="of --data")
    add("--image_root", help="folder of the image paths of --data; that of the file by default")
    add("--prompt", help="how --data is asked, with {question} in it")
    add("--limit", type=int, help="only the first questions")
    add("--tile_rule", choices=TILE_RULES, help="the checkpoint's by default")
    add("--max_num", type=int, help="most tiles an image; the checkpoint's by default")
    add("--dynamic", action="store_true", help="cut tiles, whatever the checkpoint says")
    add(
        "--no_dynamic",
        "--no-dynamic",
        dest="dynamic",
        action="store_false",
        help="squash every image into one tile",
    )
    add("--batch_size", type=int)
    add("--max_new_tokens", type=int, help="the task's by default")
    add("--temperature", type=float, help="0 (default) takes the most likely token")
    add("--top_k", type=int, help="sample from the k best tokens")
    add(
        "--top_p",
        type=float,
        help="sample from the best tokens that have this probability together",
    )
    add("--repetition_penalty", type=float)
    add("--seed", type=int)
    add(
        "--stop_string",
        action="append",
        help="text that ends an answer; may be given several times",
    )
    add("--dtype", choices=("bfloat16", "float32"))
    add(
        "--ema", action="store_true", help="the average of a run's parameters (optimizer.ema_decay)"
    )
    add(
        "--compat",
        help=f"deviations of published scripts: {', '.join(COMPAT)}; {ACCEPTANCE} or none",
    )
    add("--resume", action="store_true", help="go on with an interrupted job")
    add("--rescore", metavar="FILE", help="score a predictions.jsonl again, without the model")
    add(
        "--shard",
        metavar="I/N",
        help="answer only this share of the questions, without communication",
    )
    add("--merge", action="store_true", help="join the shards of a job and score them")
    add(
        "--judge_url",
        help=f"OpenAI-compatible endpoint of a judge; the key is read from {KEY_VARIABLE}",
    )
    add("--judge_model", help="model to ask there")
    add(
        "--judge_cache",
        help="folder of its replies; judge_cache in the folder of the task by default",
    )
    add("--allow_errors", action="store_true", help="exit with 0 although some questions failed")
    add("--list", action="store_true", help="show all tasks and whether their data are there")
    for axis in dataclasses.fields(MeshConfig):
        add(
            f"--mesh_{axis.name}",
            type=int,
            default=axis.default,
            help="devices along this mesh axis",
        )
    distributed.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = parser()
    args = vars(flags.parse_args(argv))
    if args.get("list"):
        print(list_tasks(Path(args["data_root"]), args.get("tsv_root")))
        return 0
    if not ({"checkpoint", "rescore"} & args.keys()):
        flags.error("--checkpoint is required")
    try:
        summaries = _scored(args)
    except (ConfigError, CheckpointError, SampleError, JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not summaries:
        return 0
    if any(summary["protocol"] != "generic" for summary in summaries):
        print(markdown(summaries), end="")
    for summary in summaries:
        score = "no score" if summary["score"] is None else f"{summary['score']:.4f}"
        name = summary["settings"].get("metric") or summary["task"]
        print(
            f"{name} {score} on {summary['samples']} samples, {summary['errors']} errors; "
            f"see {args['out_dir']}"
        )
    return (
        3 if any(summary["errors"] for summary in summaries) and not args.get("allow_errors") else 0
    )


def _scored(args: dict) -> list[dict]:
    def take(cls, **renamed: str) -> dict:
        """Fields of a dataclass that are among the flags, under their own or another name."""
        names = {
            field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(cls)
        }
        return {name: args[flag] for name, flag in names.items() if flag in args}

    judge = JudgeConfig(
        **take(JudgeConfig, url="judge_url", model="judge_model", cache="judge_cache")
    )
    if "rescore" in args:
        chosen = {name: args[name] for name in ("data_root", "tsv_root", "compat") if name in args}
        return [rescore(args["rescore"], **chosen, judge=judge)]
    if not ({"shard", "merge"} & args.keys()):  # these work without the other processes
        distributed.start_from(argparse.Namespace(**args))
    mesh = MeshConfig(
        **{axis.name: args[f"mesh_{axis.name}"] for axis in dataclasses.fields(MeshConfig)}
    )
    decoding = Decoding(
        sampling=Sampling(**take(Sampling)), **take(Decoding, stop_strings="stop_string")
    )
    decoding = dataclasses.replace(decoding, stop_strings=tuple(decoding.stop_strings))
    rest = take(EvalConfig)
    return run(
        EvalConfig(
            **rest,
            selection=EvaluationConfig(**take(EvaluationConfig)),
            decoding=decoding,
            judge=judge,
            mesh=mesh,
        )
    )


def list_tasks(data_root: Path, tsv_root: str | None) -> str:
    """One line a task and protocol, the default protocol first."""
    roots = Roots(data_root, Path(tsv_root) if tsv_root else data_root / "tsv")
    rows = [("task", "protocol", "questions", "data", "title")]
    for task in TASKS.values():
        for protocol, view in task.protocols.items():
            missing = view.source.missing(roots)
            there = f"{len(missing)} missing, e.g. {missing[0]}" if missing else "there"
            rows.append((task.name, protocol, str(task.samples or "-"), there, task.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]])
        for row in rows
    )
