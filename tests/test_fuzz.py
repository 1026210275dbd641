"""Whatever a file or a flag holds: a right result, or one message that names a path or a field.

Files and flags of every kind are changed at random and given to the commands. The property: exit
status 0 with every sample used or counted, or 1 (2 for usage) with one message on stderr; no other
exception, and nothing half-written. Run one input again by its number:

    FUZZ_FIRST=1234 FUZZ_INPUTS=1 python -m pytest tests/test_fuzz.py

FUZZ_INPUTS=20000 is the long form.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from fuzz import VALUES, lines, mutate_bytes, mutate_json, mutated
from PIL import Image

import internvlx_jax.cli.train as train_command
from internvlx_jax.checkpoints.run_writer import check_run_folder
from internvlx_jax.cli import main
from internvlx_jax.cli.console import run_command
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.data.faults import read_quarantine
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.evaluation.prediction_shards import Parts, read_rows
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.tsv import read_tsv
from internvlx_jax.training.bad_steps import read_bad_steps
from internvlx_jax.training.metrics_logger import read_starts
from internvlx_jax.training.report import read_metrics

INPUTS = int(os.environ.get("FUZZ_INPUTS", "900"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CHUNKS = 10
GOLDEN = Path(__file__).parent / "golden" / "internlm2"
ROOT = Path(__file__).parents[1]

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
TALK = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Good day."}]
RECORDS = [
    {"id": 1, "image": "0.png", "conversations": TURNS},
    {"id": 2, "image": "0.png", "width": 40, "height": 30, "conversations": TURNS},
    {"image": ["0.png", "1.jpg"], "conversations": [
        {"from": "human", "value": "<image> or <image>?"}, TALK[1]]},
    {"conversations": [{"from": "system", "value": "Be brief."}, *TALK, *TALK]},
    {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A"}],
     "images": ["1.jpg"]},
    {"video": "frames", "conversations": TALK},
]  # fmt: skip
META = {"d": {"root": ".", "annotation": "d.jsonl", "repeat_time": 1, "length": 6}}
TOKENIZER = sorted(path.name for path in TOKENIZER_FOLDER.iterdir())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for name in ("0.png", "1.jpg", "frames/1.png", "frames/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


# --- kinds of inputs: each writes files and runs a command ----------------------------------------


def records(rng, folder):
    chosen = [rng.choice(RECORDS) for _ in range(rng.randrange(1, 8))]
    (folder / "d.jsonl").write_bytes(lines(rng, chosen))
    (folder / "meta.json").write_text(json.dumps({"d": {"root": ".", "annotation": "d.jsonl"}}))
    return check_data(folder)


def metas(rng, folder):
    (folder / "d.jsonl").write_bytes(lines(rng, RECORDS, lambda rng, value: mutated(rng, value)))
    meta = META | {"e": {"annotation": "d.jsonl"}} if rng.random() < 0.3 else META
    (folder / "meta.json").write_bytes(mutated(rng, meta))
    return check_data(folder)


def tokenizers(rng, folder):
    shutil.copytree(TOKENIZER_FOLDER, folder / "tokenizer")
    path = folder / "tokenizer" / rng.choice(TOKENIZER)
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_bytes(mutated(rng, json.loads(data)))
    else:
        path.write_bytes(mutate_bytes(rng, data))
    (folder / "d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    (folder / "meta.json").write_text(json.dumps({"d": {"root": ".", "annotation": "d.jsonl"}}))
    return check_data(folder, "tokenizer")


def check_data(folder, tokenizer=str(TOKENIZER_FOLDER)):
    flags = ["--tokenizer", tokenizer, "--tile_size", "28", "--tokens_per_tile", "4"]
    flags += ["--out", "out", "--set", "max_length=256", "tokens_per_step=512"]
    status = main(["data", "check", "meta.json", *flags])
    report = folder / "out" / "check.json"
    assert (status == 0) == report.is_file(), "a report, or an error"
    if status == 0:
        for name, found in json.loads(report.read_text(encoding="utf-8"))["datasets"].items():
            bad = len(found["bad_samples"])
            assert found["samples"] + bad == found["records"], f"{name}: every sample is counted"
    return status


def configs(rng, folder):
    shutil.copy(GOLDEN / "model.safetensors", folder)
    fields = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_bytes(mutated(rng, fields))
    return main(["convert", "inspect", str(folder), *rng.choice(([], ["--json"]))])


def safetensors(rng, folder):
    shutil.copy(GOLDEN / "config.json", folder)
    data = (GOLDEN / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = mutated(rng, json.loads(data[8 : 8 + size]))
    length = rng.choice((len(header),) * 6 + (0, len(header) - 1, 2**63, 10**9))
    content = length.to_bytes(8, "little") + header + data[8 + size :]
    content = content[: rng.randrange(len(content))] if rng.random() < 0.2 else content
    (folder / "model.safetensors").write_bytes(content)
    return main(["convert", "inspect", str(folder)])


def tsvs(rng, folder):
    picture = (folder / "cell.txt").read_text() if (folder / "cell.txt").exists() else "AAAA"
    rows = [f"{n}\t{picture}\tWhat?\tA\tyes\tno" for n in range(3)]
    text = "index\timage\tquestion\tanswer\tA\tB\n" + "\n".join(rows) + "\n"
    (folder / "t.tsv").write_bytes(mutate_bytes(rng, text.encode()))

    def read():
        for question in read_tsv(folder / "t.tsv"):
            for image in question.images:
                if hasattr(image, "open"):
                    with contextlib.suppress(OSError), image.open() as file:
                        file.read()

    return run_command(read)


def questions(rng, folder):
    asked = [
        {"question": "What?", "answer": "A sign.", "image": "0.png", "question_id": 0},
        {"question": "<image> <image>?", "answer": ["a", "b"], "image": ["0.png", "1.jpg"]},
        {"question": "Hello?", "answer": "Good day.", "question_id": "c"},
    ]
    (folder / "q.jsonl").write_bytes(lines(rng, asked))
    return run_command(
        lambda: select(EvaluationConfig(data=str(folder / "q.jsonl"), metric="exact")) and None
    )


ROWS = {
    "index": 0, "question_id": 0, "prompt": "What?", "images": [], "tiles": 0, "prompt_tokens": 1,
    "new_tokens": 1, "finish": "stop", "raw": "a", "prediction": "a", "answer": ["a"], "score": 1.0,
    "error": None,
}  # fmt: skip
RUN_FILES = {
    "metrics.jsonl": ({"step": 1, "loss": 2.0}, lambda run: read_metrics(run / "metrics.jsonl")),
    "starts.jsonl": ({"step": 0, "time": "t", "versions": {}}, read_starts),
    "bad_steps.jsonl": ({"step": 1, "kind": "spike", "samples": [["d:1"]]}, read_bad_steps),
    "quarantine-0.jsonl": (
        {"dataset": "d", "line": 1, "reason": "json", "error": "", "annotation": "/d", "root": ""},
        lambda run: read_quarantine([run / "quarantine-0.jsonl"]),
    ),
    "predictions.jsonl": (ROWS, lambda run: read_rows(run / "predictions.jsonl")),
    "0.jsonl": (ROWS | {"settings": "s"}, lambda run: Parts(run, "s").read()),
}


def run_files(rng, folder):
    if rng.random() < 0.2:
        (folder / "config.json").write_bytes(mutated(rng, {"train": {"steps": 1}, "model": {}}))
        settings = {"train": {"steps": 1}, "model": {}}
        return run_command(lambda: check_run_folder(folder, settings) and None)
    name, (row, read) = rng.choice(sorted(RUN_FILES.items()))
    (folder / name).write_bytes(lines(rng, [row] * 3))
    return run_command(lambda: read(folder) and None)


SETTINGS = (
    "steps", "seed", "epochs", "log_every", "keep_last", "output_dir", "init_from", "lora", "model",
    "data.meta", "data.max_length", "data.length_step", "data.tokens_per_step", "data.batch_mode",
    "data.video.max_frames", "data.faults.exclude", "data.faults.max_share", "data.pack.tiles",
    "optimizer.b2", "optimizer.groups", "optimizer.schedule", "optimizer.ema_decay", "mesh.data",
    "model.decoder.heads", "model.vision.width", "model.lvtc.expand_layer", "model.prompt.eos_ids",
    "model.prompt.tiles.max_num", "model.decoder.rope.theta", "compute.accumulation",
    "freeze.paths",
    "stability.spike_factor", "evaluation", "evaluation.limit", "nothing", "data.nothing.more",
)  # fmt: skip
FLAGS = ("--stop_after", "--profile", "--num_processes", "--process_id", "--port", "--timeout")


def values(rng, folder):
    """A run config with changed settings; the run itself is left out."""
    texts = [str(value) for value in VALUES] + ["1e-3", "-1e-3", "[1]", "(", "'", "{'a': 1}", "=="]
    words = [f"{rng.choice(SETTINGS)}={rng.choice(texts)}" for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.1:
        words.append(rng.choice(texts))
    flags = [rng.choice(FLAGS), rng.choice(texts)] if rng.random() < 0.3 else []
    source = rng.choice(("demo.py",) * 6 + ("hd_finetune.py:size=2b", "demo.py:x=1", "no.py"))
    return main(["train", "--config", str(ROOT / "configs" / source), *flags, "--set", *words])


KINDS = (
    records,
    records,
    metas,
    tokenizers,
    configs,
    safetensors,
    tsvs,
    questions,
    run_files,
    values,
)


def try_one(number: int, folder: Path, pictures: Path) -> None:
    """Runs one input; raises AssertionError, or what the command should not have raised."""
    rng = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    shutil.copytree(pictures, folder)
    before = Path.cwd()
    os.chdir(folder)
    out, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                status = kind(rng, folder)
            except SystemExit as stop:
                status = stop.code
    finally:
        os.chdir(before)
    told = [line for line in error.getvalue().splitlines() if line.startswith("error: ")]
    assert status in (0, 1, 2), status
    # inspect says in its report what is wrong with a checkpoint that can be opened.
    reported = kind in (configs, safetensors) and status == 1 and out.getvalue()
    assert len(told) == (status != 0) or reported, error.getvalue()
    assert "Traceback" not in error.getvalue() + out.getvalue()
    if told:
        place = r"[\w.-]*/[\w./-]+|[\w-]+\.\w+|--\w+|\w+ is |\"\w+\"|line \d+|^error: \w+: "
        place += "|unknown argument|give "
        assert re.search(place, told[0]), told[0]
        assert len(told[0]) < 8000, "no payload is repeated"
    assert not list(folder.rglob("*.partial*")), "nothing is half-written"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_input_is_used_or_refused_in_one_line(chunk, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("internvlx_jax.training.loop.train", lambda config, **_: None)
    monkeypatch.setattr(train_command.distributed, "start_from", lambda args: 0)
    monkeypatch.setattr(sys, "argv", ["internvlx"])
    failed = []
    for number in range(FIRST + chunk, FIRST + INPUTS, CHUNKS):
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                try_one(number, folder, pictures)
            except Exception as error:
                kind = KINDS[number % len(KINDS)].__name__
                failed.append(f"input {number} ({kind}): {type(error).__name__}: {error}"[:2000])
        shutil.rmtree(folder)
    assert not failed, f"{len(failed)} inputs failed:\n" + "\n".join(failed[:20])


def test_a_changed_value_is_a_changed_value():
    changed = [mutate_json(random.Random(n), RECORDS[0]) for n in range(200)]
    assert sum(str(value) != str(RECORDS[0]) for value in changed) > 150
