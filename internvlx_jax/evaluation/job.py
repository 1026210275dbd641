"""One evaluation job: checkpoint + question file + metric -> predictions.jsonl and summary.json."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import jax

from internvlx_jax.convert.load import load_pretrained
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import get_template
from internvlx_jax.errors import ConfigError
from internvlx_jax.evaluation.answering import Answer, Answerer
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.questions import read_questions
from internvlx_jax.files import write_json, write_text
from internvlx_jax.training.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of a job; None takes the checkpoint's own.

    Attributes:
        prompt: how a question is asked; `{question}` stands for its text.
        tile_rule, max_num, dynamic: replace the checkpoint's tiling.
    """

    checkpoint: str
    data: str
    metric: str
    out_dir: str
    image_root: str | None = None
    prompt: str = "{question}"
    tile_rule: str | None = None
    max_num: int | None = None
    dynamic: bool | None = None
    batch_size: int = 16
    max_new_tokens: int = 100
    dtype: str = "bfloat16"
    limit: int | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ConfigError(f"metric {self.metric!r} is unknown; choose one of {', '.join(METRICS)}")
        if "{question}" not in self.prompt:
            raise ConfigError(f"prompt {self.prompt!r} does not contain {{question}}")
        for name in ("max_num", "batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, it must be at least 1")


def run(config: EvalConfig) -> dict[str, Any]:
    """Score a checkpoint; returns the summary that it writes to out_dir/summary.json."""
    data = Path(config.data)
    questions = read_questions(data, None if config.image_root is None else Path(config.image_root), config.limit)
    mesh = make_mesh(config.mesh)
    pretrained = load_pretrained(config.checkpoint, dtype=config.dtype, mesh=mesh)
    if pretrained.tokenizer is None:
        raise ConfigError(f"{config.checkpoint} holds no tokenizer.model; copy the tokenizer files into it")
    prompt = pretrained.config.prompt
    overrides = {"rule": config.tile_rule, "max_num": config.max_num, "dynamic": config.dynamic}
    tiles = dataclasses.replace(prompt.tiles, **{k: v for k, v in overrides.items() if v is not None})
    processor = Processor(pretrained.tokenizer, get_template(prompt.template), prompt.system_message, tiles,
                          pretrained.config.tokens_per_tile, special_text="escape", lvtc=pretrained.config.lvtc)
    answerer = Answerer(pretrained, processor, mesh, batch_size=config.batch_size,
                        max_new_tokens=config.max_new_tokens)

    started = time.perf_counter()
    asked = [dataclasses.replace(q, text=config.prompt.replace("{question}", q.text)) for q in questions]
    answers = answerer.answer(asked, lambda done: print(f"{done}/{len(asked)} answered", flush=True))
    seconds = time.perf_counter() - started

    metric = METRICS[config.metric]
    rows = [_row(answer, 0.0 if answer.error else metric(answer.text, answer.question.answers)) for answer in answers]
    errors = [row for row in rows if row["error"]]
    summary = {
        "metric": config.metric,
        "score": sum(row["score"] for row in rows) / len(rows),
        "samples": len(rows),
        "errors": len(errors),
        "stopped_by_length": sum(row["finish"] == "length" for row in rows),
        "settings": dataclasses.asdict(config) | {"tiles": dataclasses.asdict(tiles), "template": prompt.template},
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "seconds": seconds,
        "new_tokens_per_s": sum(row["new_tokens"] for row in rows) / seconds,
        "executables": answerer.executables,
        "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("internvlx-jax", "jax", "flax", "pillow")},
    }
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(out / "summary.json", summary)
    return summary


def _row(answer: Answer, score: float) -> dict[str, Any]:
    question = answer.question
    return {"question_id": question.id, "prompt": question.text, "images": question.images, "tiles": answer.tiles,
            "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens, "finish": answer.finish,
            "prediction": answer.text, "answer": question.answers, "score": score, "error": answer.error}
