"""An evaluation job: a checkpoint and tasks -> predictions, scores and a report.

(design: evaluation.md 2, 8, 9) The files of a task lie in OUT_DIR/MODEL/TASK, those of a question
file (--data) in OUT_DIR itself; `task_run` lists them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.extras import require
from internvlx_jax.core.files import write_json
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.evaluation.job_config import Decoding, EvalConfig, JudgeConfig
from internvlx_jax.evaluation.judge import RequestBudget
from internvlx_jax.evaluation.prediction_tables import write_joined
from internvlx_jax.evaluation.records import RunInfo, Summary
from internvlx_jax.evaluation.score_table import write_report
from internvlx_jax.evaluation.scoring import ScoringError
from internvlx_jax.evaluation.selection import TaskSpec, select
from internvlx_jax.evaluation.task_run import TaskRun
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.inference.loading import load_opened
from internvlx_jax.inference.requests import GenerationSpec, Tiler
from internvlx_jax.models.sharding import make_mesh

__all__ = ["EvalConfig", "JudgeConfig", "ScoringError", "generation_spec", "run"]

WHOLE = 1 << 20  # largest checkpoint file, in bytes, that is read whole


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
    score = config.shard is None and jax.process_index() == 0
    summaries, failures = [], []
    budget = RequestBudget(config.judge.budget)
    for task_run, generation in task_runs:
        judge = config.judge.open(task_run.folder, budget)
        try:
            summary = task_run.run(
                generator, generation, shard=config.shard_of, score=score, judge=judge
            )
            summaries += [] if summary is None else [summary]
        except ScoringError as error:  # the other tasks are answered first
            failures.append(error)
        if score and generator is not None:
            info = _run_info(config, generator, task_run.seconds)
            write_json(task_run.folder / "run.json", info.to_json())
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


def checkpoint_hash(folder: Path) -> str:
    """Identifies a checkpoint without reading all of it.

    The hash covers names and sizes of all files, small files whole, and the first and the last
    megabyte of the others.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE))
            if size > WHOLE:
                file.seek(-min(WHOLE, size - WHOLE), 2)
                digest.update(file.read())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFile:
    """A question file of the user, which takes the place of a benchmark.

    Attributes:
        data: path of the file.
        metric: how its answers are scored.
        image_root: folder of its image paths; None is that of the file.
        prompt: how a question is asked, with {question} in it.
    """

    data: str
    metric: str
    image_root: str | None
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointIdentity:
    """The parameters of a stored checkpoint.

    Attributes:
        checkpoint: path or name, as given.
        checkpoint_hash: hash of its files (`checkpoint_hash`).
        dtype: dtype in which they are used.
        ema: whether the average of the trained parameters is used instead of them.
    """

    checkpoint: str
    checkpoint_hash: str
    dtype: str
    ema: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """The parameters of a run in memory, after `step` updates."""

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Everything that decides the answers of a task; its hash guards a resumed job.

    Attributes:
        task, protocol: the benchmark and whose prompts it is asked with.
        limit: number of questions asked; None for all.
        tiles: how images are cut.
        rgb: when images are converted to RGB ("first" or "after_tiling").
        template, system_message: the conversation around a prompt.
        max_new_tokens, min_new_tokens: bounds of the length of an answer.
        sampling, seed, stop_strings: how tokens are chosen and what ends an answer.
        data_sha256: hash of each data file.
        question_file: the file of the user, None for a benchmark.
        parameters: the parameters of the model; None while they are not known.
        cot: whether the task was asked for a chain of thought.
        frames: number of frames of a video; None for images, and for the task's own number.
    """

    task: str
    protocol: str
    limit: int | None
    tiles: TileConfig
    rgb: str
    template: str
    system_message: str | None
    max_new_tokens: int
    min_new_tokens: int
    sampling: Sampling
    seed: int
    stop_strings: tuple[str, ...]
    data_sha256: Mapping[str, str]
    question_file: QuestionFile | None = None
    parameters: CheckpointIdentity | TrainingStep | None = None
    cot: bool = False
    frames: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns one flat JSON object; file and parameters add their fields at its end.

        `cot`, `frames` and `ema` are left out where they are not used.
        """
        fields = dict(vars(self)) | {
            "tiles": dataclasses.asdict(self.tiles),
            "sampling": dataclasses.asdict(self.sampling),
            "stop_strings": list(self.stop_strings),
            "data_sha256": dict(self.data_sha256),
        }
        parts = (fields.pop("question_file"), fields.pop("parameters"))
        unused = [name for name in ("cot", "frames") if not fields[name]]
        for name in unused:
            del fields[name]
        for part in parts:
            fields |= {} if part is None else vars(part)
        if not fields.get("ema"):
            fields.pop("ema", None)
        return fields


def generation_spec(
    spec: TaskSpec,
    selection: EvaluationConfig,
    model: ModelConfig,
    tiles: TileConfig,
    max_num: int | None,
    decoding: Decoding,
) -> tuple[GenerationSpec, AnswerSettings]:
    """Returns how a model is asked the questions of a task, and the settings that record it.

    Args:
        spec: the task.
        selection: what was selected.
        model: the model.
        tiles: how the model cuts images.
        max_num: the user's own tile maximum; None if it is not set.
        decoding: how tokens are chosen.
    """
    protocol_spec = spec.protocol_spec
    baseline = model.projector.kind == "mlp1" and tiles.rule == "off"
    if baseline and max_num is None and not spec.generic:
        own = protocol_spec.baseline_tiles
        most = spec.task.baseline_tiles if own is None else own
        tiles = dataclasses.replace(tiles, max_num=most)
    tiler = Tiler(
        tiles,
        protocol_spec.images(tiles.dynamic),
        # Without a grid the references convert an image before they squash it into one tile.
        "after_tiling" if "rgb_after_tiling" in spec.compat and tiles.dynamic else "first",
    )
    generation = GenerationSpec(
        tiler=tiler,
        max_new_tokens=selection.max_new_tokens or protocol_spec.max_new_tokens,
        min_new_tokens=protocol_spec.min_new_tokens,
        sampling=decoding.sampling,
        seed=decoding.seed,
        stop_strings=decoding.stop_strings,
    )
    return generation, _answer_settings(spec, selection, model, generation)


def _answer_settings(
    spec: TaskSpec, selection: EvaluationConfig, model: ModelConfig, generation: GenerationSpec
) -> AnswerSettings:
    return AnswerSettings(
        task=spec.task.name,
        protocol=spec.protocol,
        limit=selection.limit,
        tiles=generation.tiler.tiles,
        rgb=generation.tiler.rgb,
        template=model.prompt.template,
        system_message=model.prompt.system_message,
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=generation.min_new_tokens,
        sampling=generation.sampling,
        seed=generation.seed,
        stop_strings=generation.stop_strings,
        data_sha256=spec.hashes,
        question_file=_question_file(selection) if spec.generic else None,
        cot=selection.cot and spec.protocol_spec.cot is not None,
        frames=selection.frames if spec.protocol_spec.frames else None,
    )


def _question_file(selection: EvaluationConfig) -> QuestionFile:
    assert selection.data is not None and selection.metric is not None
    return QuestionFile(
        data=selection.data,
        metric=selection.metric,
        image_root=selection.image_root,
        prompt=selection.prompt,
    )


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
