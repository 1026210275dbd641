"""A whole session with a tiny InternVL that has a byte-level BPE tokenizer, as a user types it.

JSONL -> train -> resume -> evaluate -> chat -> export.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from PIL import Image

import internvlx_jax
from internvlx_jax.cli.convert import main as convert
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.run_config import ComputeConfig, OptimizerConfig, TrainConfig
from internvlx_jax.evaluation.job import EvalConfig
from internvlx_jax.evaluation.job import run as evaluate
from internvlx_jax.training.loop import train

TOKENIZER = Path(__file__).parents[1] / "golden" / "bpe" / "tokenizer_slow"
VOCABULARY = 600  # rows; the tokenizer has 588 ids
QUESTION = "图片里有什么？ 😀"
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Session:
    """What a session leaves.

    Attributes:
        source: the InternVL checkpoint that it began with.
        run: the run folder.
        page: an image.
        hf, internvl: exported folders in both layouts.
        answer: what the model said about the page.
    """

    source: Path
    run: Path
    page: Path
    hf: Path
    internvl: Path
    answer: str


def run_session(folder: Path, make_checkpoint, golden: Path) -> Session:
    """Runs every command; its folders lie in `folder`."""
    source, run, page = folder / "source", folder / "run", folder / "page.png"
    config = json.loads((golden / "internlm2" / "config.json").read_text())
    llm = config["llm_config"] | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "rope_scaling": None,
    }
    prompt = {"template": "internvl2_5", "system_message": "", "max_dynamic_patch": 2}
    make_checkpoint(source, "qwen2", "mlp1", llm_config=llm, **prompt)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, source / file.name)

    Image.new("RGB", (112, 56), "white").save(page)
    training = train_config(source, write_data(folder), run)
    train(training, stop_after=STEPS // 2)
    train(training)

    (folder / "questions.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "一只猫", "image": page.name}) + "\n"
    )
    selection = EvaluationConfig(
        data=str(folder / "questions.jsonl"), metric="exact", max_new_tokens=4
    )
    job = EvalConfig(checkpoint=str(run), out_dir=str(folder / "eval"), selection=selection)
    (summary,) = evaluate(job)
    assert summary.score is not None

    chat = internvlx_jax.load(run, dtype="float32").chat(max_new_tokens=12)
    answer = "".join(chat.stream(QUESTION, [str(page)]))
    exported = {}
    for layout in ("hf", "internvl"):
        exported[layout] = folder / layout
        flags = ["--layout", layout, "--dtype", "keep", "--verify"]
        assert convert(["export", "--from", str(run), "--to", str(folder / layout), *flags]) == 0
    return Session(source, run, page, exported["hf"], exported["internvl"], answer)


def train_config(source: Path, meta: Path, run: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(run),
        init_from=str(source),
        data=DataConfig(meta=str(meta), batch_mode="samples", samples_per_step=8, max_length=256),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0),
        compute=ComputeConfig(dtype="float32", remat="none"),
        steps=STEPS,
        log_every=1,
        save_every=100,
        eval_every=100,
    )


def write_data(folder: Path) -> Path:
    """Writes the annotation and its meta file."""
    answers = ["一只猫坐在垫子上。", "😀 fine", "12.50", "\n\nThe total", "é", "a\r\nb"]
    rows = []
    for answer in answers:
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]
        rows.append({"image": "page.png", "conversations": turns})
        rows.append({"conversations": turns})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    entry = {"root": str(folder), "annotation": str(folder / "train.jsonl")}
    (folder / "meta.json").write_text(json.dumps({"pages": entry}))
    return folder / "meta.json"
