"""Tasks during training: scores in metrics.jsonl, files as eval.py writes them.

(design: training.md 9)
"""

import json

import jax
import pytest

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.overrides import from_dict, to_dict
from internvlx_jax.core.run_config import ComputeConfig, TrainConfig
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate
from internvlx_jax.evaluation.in_loop import InLoop, _label
from internvlx_jax.evaluation.selection import select
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training import run
from internvlx_jax.training.loop import train


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in_loop") / "data"
    generate(
        folder, SyntheticConfig(train_samples=8, val_samples=2, text_share=0.0, two_page_share=0.0)
    )
    return folder


@pytest.mark.slow
def test_tasks_are_scored_while_training(
    pages, checkpoint, configure, run_on, data_root, tmp_path, monkeypatch
):
    selection = EvaluationConfig(
        tasks="mme,chartqa_human",
        data_root=str(data_root),
        data=str(pages / FILES["val_vqa"]),
        metric="exact",
        limit=4,
        max_new_tokens=6,
    )
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        init_from=str(checkpoint),
        steps=2,
        eval_every=2,
        save_every=2,
        log_every=1,
        data=DataConfig(
            meta=str(pages / FILES["meta_train"]),
            tokenizer=str(TOKENIZER_FOLDER),
            max_length=256,
            batch_mode="samples",
            samples_per_step=2,
            max_executables=1,
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        evaluation=selection,
    )
    assert from_dict(TrainConfig, to_dict(config)) == config
    monkeypatch.setattr(
        run, "make_mesh", lambda mesh, rows: make_mesh(mesh, devices=jax.devices()[:1], rows=rows)
    )
    latest = train(config, benchmarks=InLoop)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    scored = [row for row in rows if "eval/mme" in row]
    assert [row["step"] for row in scored] == [0, 2] and latest["eval/mme"] == scored[-1][
        "eval/mme"
    ]
    assert {"eval/chartqa_human", "eval/val_vqa"} <= scored[0].keys()
    assert max(row["executables"] for row in rows if "executables" in row) == 1, (
        "the training step compiled once"
    )

    # What eval.py makes of the saved checkpoint.
    eval_settings = {name: value for name, value in vars(selection).items() if value is not None}
    run_on(
        configure(
            tmp_path / "out", checkpoint=str(RunFolder(tmp_path / "run").path), **eval_settings
        )
    )
    for task, folder in (
        ("mme", tmp_path / "out" / "run-2" / "mme"),
        ("val_vqa", tmp_path / "out"),
    ):
        here = tmp_path / "run" / "evaluation" / "step-2" / task / "predictions.jsonl"
        assert here.read_bytes() == (folder / "predictions.jsonl").read_bytes()


def test_a_question_file_named_as_a_benchmark_keeps_its_own_score(pages, data_root, tmp_path):
    """Scores and files go by names, of which a question file may have any."""
    line = (pages / FILES["val_vqa"]).read_text().splitlines()[0]
    asked = {}
    for name in ("mme.jsonl", "loss.jsonl", "exact.jsonl", "own.jsonl"):
        (tmp_path / name).write_text(line + "\n")
        selection = EvaluationConfig(
            tasks="mme", data_root=str(data_root), data=str(tmp_path / name),
            image_root=str(pages / "synthetic_pages"), metric="exact",
        )  # fmt: skip
        asked[name] = [_label(spec) for spec in select(selection)]
    assert asked == {
        "mme.jsonl": ["mme", "mme.jsonl"],
        "loss.jsonl": ["mme", "loss.data"],
        "exact.jsonl": ["mme", "exact.data"],
        "own.jsonl": ["mme", "own"],
    }
    alone = EvaluationConfig(
        data=str(tmp_path / "mme.jsonl"), image_root=str(pages / "synthetic_pages"), metric="exact"
    )
    assert [spec.task.name for spec in select(alone)] == ["mme"]
