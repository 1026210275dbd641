"""Cells of the ablation: one variant, trained with one seed and scored, for benchmarks/ablation.py.

A cell is a JSON file in RESULTS/TABLE-PRESET and is written when it is complete. Its run folder
lies in RUNS and resumes, so that an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import resource
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import internvlx_jax
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_writer import write_params
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.files import new_folder, read_json_lines, write_json, write_text
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.evaluation.job import EvalConfig, run
from internvlx_jax.evaluation.metrics import exact
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.params import abstract_model, init_params
from internvlx_jax.models.sharding import make_mesh, param_shardings
from internvlx_jax.training.loop import train

# Fields that name places; two runs that differ in nothing else are the same.
PLACES = ("output_dir", "init_from", "meta", "val_meta", "tokenizer", "index_dir")


@dataclasses.dataclass(frozen=True)
class Cell:
    """Names one cell.

    Attributes:
        table: `pages` or `easyvqa`.
        preset: Size of the table.
        variant: Row of the table.
        seed: Of the run.
    """

    table: str
    preset: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.group}: {self.variant}, seed {self.seed}"

    @property
    def group(self) -> str:
        """Folder of the table's cells."""
        return f"{self.table}-{self.preset}"

    def file(self, results: Path) -> Path:
        """Returns where the finished cell is kept."""
        return results / self.group / f"{self.variant}-s{self.seed}.json"


@dataclasses.dataclass(frozen=True)
class Asked:
    """Describes the questions of a table: the test and its controls in one file.

    Attributes:
        file: Questions with the ids SPLIT/NUMBER.
        kinds: Kind of each question, by id.
        repeats: By id the (id, answer) of those that ask the same of the same image. Each of them
            has a score, the model is asked once.
    """

    file: Path
    kinds: Mapping[str, str]
    repeats: Mapping[str, Sequence[tuple[str, str]]]


def merged_questions(splits: Mapping[str, Path], kind: str, out: Path) -> Asked:
    """Joins question files of one folder, so that one evaluation answers all of them.

    Args:
        splits: Question files by split; all lie in one folder.
        kind: The field that says of which kind a question is.
        out: The file to write, in the same folder.

    Returns:
        The questions; their ids are SPLIT/NUMBER.
    """
    rows, kinds = [], {}
    first: dict[tuple[str, str], str] = {}
    repeats = defaultdict(list)
    for split, path in splits.items():
        for row in read_json_lines(path, "question", "answer", "image", kind):
            name = f"{split}/{row['question_id']}"
            kinds[name] = row[kind]
            before = first.setdefault((row["image"], row["question"]), name)
            if before != name:
                repeats[before].append((name, row["answer"]))
                continue
            rows.append({key: row[key] for key in ("image", "question", "answer")})
            rows[-1]["question_id"] = name
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    return Asked(out, kinds, repeats)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Describes one run of a cell.

    Attributes:
        config: The run.
        before: Makes what the run begins with.
        begins_with: Settings of what `before` makes.
    """

    config: TrainConfig
    before: Callable[[], None] | None = None
    begins_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the last step is saved, so that other cells need not open the run again."""
        return (Path(self.config.output_dir) / "checkpoints" / str(self.config.steps)).is_dir()


def settings_hash(stages: Sequence[Stage]) -> str:
    """Returns a digest of what the runs of a cell do, wherever their files lie.

    Settings at their defaults are left out, so that cells outlive settings that come later.
    """
    made = [[_chosen(stage.config), dict(stage.begins_with)] for stage in stages]
    text = json.dumps(made, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(value: Any) -> Any:
    """Returns the fields of a config that differ from their defaults and name no place."""
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: field for field in dataclasses.fields(value)}
    return {
        name: _chosen(found)
        for name, found in vars(value).items()
        if name not in PLACES and found != fields[name].default
    }


def finished(cell: Cell, results: Path, settings: str) -> bool:
    """Returns whether the cell is kept already.

    Raises:
        ConfigError: It is, but was made with other settings.
    """
    path = cell.file(results)
    found = read_json_object(path)
    if found and found.get("settings") != settings:
        raise ConfigError(
            f"{path} was made with other settings than the config has now; delete it, or give "
            "another --results"
        )
    return bool(found)


def run_cell(
    cell: Cell,
    stages: Sequence[Stage],
    asked: Asked,
    *,
    results: Path,
    blind: Mapping[str, float],
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Trains and scores a cell, and keeps it.

    Args:
        cell: Its name.
        stages: Its runs, one after the other; the last one is scored.
        asked: The questions.
        results: Folder of the finished cells.
        blind: Exact match of the best answerer that sees no image, by kind.
        max_new_tokens: Longest answer.
        batch_size: Rows of a batch of questions.

    Returns:
        What was kept.
    """
    config = stages[-1].config
    curves = [trained(stage) for stage in stages[:-1]]
    resumed, begun = Path(config.output_dir).exists(), _cpu_seconds()
    curves.append(trained(stages[-1]))
    model = model_of(config)
    answers = _answers(config, asked.file, max_new_tokens, batch_size)
    repeated = [
        {"question_id": name, "score": exact(row["prediction"], [answer])}
        for row in answers
        for name, answer in asked.repeats.get(row["question_id"], ())
    ]
    kept = {
        **dataclasses.asdict(cell),
        "settings": settings_hash(stages),
        "recipe": [_recipe(stage.config) | {"begins_with": stage.begins_with} for stage in stages],
        "software": _software(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": _parameters(model),
        # Of the last run and the answers; an interrupted cell does not know what it took before.
        "cpu_seconds": None if resumed else round(_cpu_seconds() - begun),
        "curves": curves,
        "blind": dict(blind),
        **_scores(answers + repeated, asked.kinds),
        "cost": cost(model, [row for row in answers if row["question_id"].startswith("test/")]),
    }
    cell.file(results).parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.file(results), kept)
    return kept


def trained(stage: Stage) -> dict[str, list[list[float]]]:
    """Runs a stage, unless it is finished, and returns its curves."""
    if not stage.finished:
        if stage.before is not None:
            stage.before()
        train(stage.config)
    return _curve(read_json_lines(Path(stage.config.output_dir) / "metrics.jsonl", "step"))


def write_start(row: TrainConfig, tower: Path, decoder: Path) -> None:
    """Writes the checkpoint that a row begins with, unless that is done.

    Args:
        row: The run that begins with it; what it trains besides is drawn by its seed.
        tower: The file of the tower, see `ablation_classifier.train_classifier`.
        decoder: The run whose decoder is taken.
    """
    start = Path(str(row.init_from))
    if start.exists():
        return
    model, trained = model_of(row), RunFolder(decoder)
    stored = abstract_model(trained.config, dtype="float32")
    mesh = make_mesh(row.mesh, rows=1)
    loaded = trained.load(stored, param_shardings(stored.shapes, stored.axes, mesh))
    read = {path: value for path, value in loaded.items() if path.startswith("decoder.")}
    write_model(start, model, tower, row.seed, read)


def write_model(
    out: Path, model: ModelConfig, tower: Path, seed: int, params: Mapping[str, jax.Array]
) -> None:
    """Writes a checkpoint.

    Args:
        out: Its folder.
        model: The model.
        tower: The file of the tower, see `ablation_classifier.train_classifier`.
        seed: Of what is drawn: all but the tower and `params`.
        params: Others that are known, by dotted path.
    """
    with np.load(tower) as found:
        known = params | {f"vision.{name}": found[name] for name in found.files}
    metadata = {"model": to_dict(model)}
    fresh = abstract_model(model, dtype="float32").shapes.keys() - known.keys()
    drawn = init_params(model, seed, paths=fresh)
    arrays = ((path, np.asarray(value)) for path, value in (drawn | known).items())
    with new_folder(out) as folder:
        write_params(folder.absolute() / "checkpoints" / "0", metadata, arrays)
        write_json(folder / "config.json", metadata)


def _answers(
    config: TrainConfig, questions: Path, max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Lets the model of a run answer the questions and returns the scored rows."""
    out = Path(config.output_dir) / "evaluation"
    selection = EvaluationConfig(data=str(questions), metric="exact", max_new_tokens=max_new_tokens)
    run(
        EvalConfig(
            checkpoint=config.output_dir,
            out_dir=str(out),
            selection=selection,
            batch_size=batch_size,
            dtype=config.compute.dtype,
            resume=True,
        )
    )
    return read_json_lines(out / "predictions.jsonl", "question_id", "score")


def cost(model: ModelConfig, answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns what an average question costs: tiles, visual tokens, and GFLOP of its prompt.

    Args:
        model: The model.
        answers: Rows of predictions.jsonl; `prompt_tokens` counts the visual tokens of the deep
            layers.

    Returns:
        `tiles`; visual tokens in the `shallow` and `deep` layers and on average over the layers
        (`tokens`); GFLOP of a forward pass by part and in total, without the head, which prefill
        computes for one token.
    """
    lvtc, layers = model.lvtc, model.decoder.layers
    low = high = model.token_grid**2
    first_deep, saved = 0, 0
    if lvtc is not None:
        low, high, first_deep = lvtc.low_grid**2, lvtc.high_grid**2, lvtc.expand_layer
        saved = lvtc.saved_per_tile
    tiles = sum(row["tiles"] for row in answers) / len(answers)
    totals = dict.fromkeys(("tower", "projector", "decoder"), 0.0)
    for row in answers:
        n, length = row["tiles"], row["prompt_tokens"]
        short = [length - n * saved] if lvtc is not None else []
        flops = forward_flops(model, tiles=n, lengths=[length], short_lengths=short)
        for part in totals:
            totals[part] += getattr(flops, part) / len(answers) / 1e9
    tokens = tiles * (first_deep * low + (layers - first_deep) * high) / layers
    gflop = {**totals, "total": sum(totals.values())}
    found = {"tiles": tiles, "shallow": tiles * low, "deep": tiles * high, "tokens": tokens}
    return {name: round(value, 4) for name, value in found.items()} | {
        "gflop": {name: round(value, 6) for name, value in gflop.items()}
    }


def _scores(
    answers: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {"scores", "counts"} by split and kind of question."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in answers:
        split = groups[row["question_id"].partition("/")[0]]
        for kind in ("all", kinds[row["question_id"]]):
            split[kind].append(row["score"])
    return {
        "scores": {
            split: {kind: round(sum(found) / len(found), 6) for kind, found in by_kind.items()}
            for split, by_kind in groups.items()
        },
        "counts": {
            split: {kind: len(found) for kind, found in by_kind.items()}
            for split, by_kind in groups.items()
        },
    }


def model_of(config: TrainConfig) -> ModelConfig:
    """Returns the model of a run that names one."""
    if config.model is None:
        raise ConfigError(f"the config of {config.output_dir} names no model")
    return config.model


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Returns [step, value] of training and validation."""
    names = ("loss", "eval/loss", "eval/exact")
    return {
        name: [[row["step"], round(row[name], 4)] for row in rows if name in row] for name in names
    }


def _recipe(config: TrainConfig) -> dict[str, Any]:
    return {
        "steps": config.steps,
        "samples_per_step": config.data.samples_per_step,
        "learning_rate": config.optimizer.learning_rate,
        "schedule": config.optimizer.schedule,
        "dtype": config.compute.dtype,
    }


def _software() -> dict[str, str]:
    return {
        "internvlx_jax": internvlx_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _parameters(model: ModelConfig) -> int:
    return sum(leaf.size for leaf in abstract_model(model, dtype="float32").shapes.values())


def _cpu_seconds() -> float:
    """Returns the CPU time of this process, which other work on the machine hardly changes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
