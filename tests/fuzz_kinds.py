"""What the fuzzer tries (tests/test_fuzz.py): each kind writes files and runs a command."""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
from fuzz import VALUES, json_bytes, lines, mutate_bytes, mutated

from internvlx_jax.checkpoints.run_writer import check_run_folder
from internvlx_jax.cli import main
from internvlx_jax.cli.console import run_command
from internvlx_jax.convert.part_sources import open_decoder
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.files import read_run_settings
from internvlx_jax.data.faults import read_quarantine
from internvlx_jax.data.form_dataset import FormConfig, generate_forms
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.evaluation.records import Parts, read_rows
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.tsv import read_tsv
from internvlx_jax.training.bad_steps import read_bad_steps
from internvlx_jax.training.metrics_logger import read_starts
from internvlx_jax.training.report import read_metrics

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


def bpe_tokenizers(rng, folder):
    """Byte-level BPE in both forms of its files."""
    source = GOLDEN.parent / "bpe" / rng.choice(("tokenizer", "tokenizer_slow"))
    shutil.copytree(source, folder / "tokenizer")
    path = rng.choice(sorted((folder / "tokenizer").iterdir()))
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_bytes(mutated(rng, json.loads(data)))
    else:
        path.write_bytes(mutate_bytes(rng, data))
    (folder / "d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    (folder / "meta.json").write_text(json.dumps({"d": {"root": ".", "annotation": "d.jsonl"}}))
    return check_data(folder, "tokenizer", "internvl2_5")


@functools.cache
def gguf_bytes():
    """Returns a small GGUF file with a decoder and a tokenizer, and where its tensors begin."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.gguf"
        writer = gguf.GGUFWriter(path, "qwen2")
        sizes = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 16,
                 "attention.head_count": 2, "context_length": 32}  # fmt: skip
        for name, value in sizes.items():
            writer.add_uint32(f"qwen2.{name}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        tokens = [*map(chr, range(33, 127)), "ab", "<|im_end|>"]
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 1) + [3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(len(tokens) - 1)
        for name in ("token_embd", "blk.0.attn_q"):
            writer.add_tensor(f"{name}.weight", np.ones((8, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = path.read_bytes()
    return data, len(data) - 2 * 8 * 8 * 4


def ggufs(rng, folder):
    data, header = gguf_bytes()
    head = mutate_bytes(rng, data[:header])
    if rng.random() < 0.3:  # one number of the header, as large as it gets
        place = rng.randrange(len(head))
        head = head[:place] + rng.choice((b"\xff" * 8, b"\0" * 8, b"\1\0\0\0")) + head[place + 8 :]
    (folder / "m.gguf").write_bytes(head + data[header:])

    def read():
        part, aside = open_decoder(folder / "m.gguf", keep_template=rng.random() < 0.5)
        for name in part.tensors.names():
            part.tensors.read(name)
        del aside

    return run_command(read)


URLS = (
    "gs://bucket/fuzz/d.jsonl", "gs://bucket/fuzz", "gs://bucket/fuzz/0.png", "gs://bucket", "gs://",
    "gs:///d.jsonl", "gs:/bucket/d.jsonl", "gs//bucket/d.jsonl", "GS://bucket/fuzz/d.jsonl",
    "gcs://bucket/fuzz/d.jsonl", "gs://nothing/d.jsonl", "gs://forbidden/d.jsonl", "://d.jsonl",
    "gs://expired/d.jsonl", "gs://bucket/fuzz/%zz", "gs://bucket/fuzz/a b#c?d", "file://d.jsonl",
    "memory://d.jsonl", "gs://bucket/fuzz//d.jsonl", "gs://bucket/../d.jsonl", "gs://bucket/fuzz/",
)  # fmt: skip


def urls(rng, folder):
    """Annotations, roots and images behind URLs; half of these are written wrongly."""
    rows = [dict(RECORDS[0], image=rng.choice((*URLS, "0.png"))) for _ in range(2)]
    (folder / "d.jsonl").write_bytes(b"\n".join(json_bytes(rng, row) for row in rows))
    entry = {"root": rng.choice((*URLS, ".")), "annotation": rng.choice((*URLS, "d.jsonl"))}
    (folder / "meta.json").write_text(json.dumps({"d": entry}))
    return check_data(folder)


def comparisons(rng, folder):
    """Two evaluation jobs, and `report eval` over them."""
    for model in "ab":
        task = folder / model / "textvqa_val"
        task.mkdir(parents=True)
        rows = [ROWS | {"index": n, "question_id": n, "score": n % 2} for n in range(3)]
        (task / "summary.json").write_bytes(json_bytes(rng, SUMMARY | {"model": model}))
        (task / "predictions.jsonl").write_bytes(b"\n".join(json_bytes(rng, r) for r in rows))
    if rng.random() < 0.5:
        path = task / "summary.json"
        path.write_bytes(mutated(rng, SUMMARY | {"model": "b"}))
    else:
        (task / "predictions.jsonl").write_bytes(lines(rng, rows))
    return main(["report", "eval", "a", "b", "--resamples", "100"])


def forms(rng, folder):
    """The dataset of forms: its config, and a folder that holds another file of its name."""
    sizes = {name: rng.choice((1, 1, 2, *VALUES)) for name in ("seed", "train", "val", "controls")}
    sizes = {name: n for name, n in sizes.items() if isinstance(n, int) and n < 3}
    if rng.random() < 0.5:
        (folder / "forms").mkdir()
        stored = {"version": 1, "config": {"seed": 0, "train": 1}, "questions": {}, "chance": {}}
        (folder / "forms" / "forms.json").write_bytes(mutated(rng, stored))
    sizes = {"train": 1, "val": 1, "test": 1, "controls": 1} | sizes
    return run_command(lambda: generate_forms(folder / "forms", FormConfig(**sizes)) and None)


def check_data(folder, tokenizer=str(TOKENIZER_FOLDER), template="internlm2-chat"):
    flags = ["--tokenizer", tokenizer, "--tile_size", "28", "--tokens_per_tile", "4"]
    flags += ["--template", template]
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
SUMMARY = {
    "task": "textvqa_val", "title": "TextVQA", "protocol": "internvl", "model": "a", "score": 50.0,
    "parts": {}, "samples": 3, "errors": 0, "stopped_by_length": 0, "notes": [], "judge": None,
    "compat": [], "files": [], "settings": {}, "settings_hash": "0", "versions": {},
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
    if rng.random() < 0.1:
        (folder / "config.json").write_bytes(mutated(rng, {"train": {"steps": 1}, "model": {}}))
        return run_command(lambda: read_run_settings(folder) and None)
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
    bpe_tokenizers,
    ggufs,
    urls,
    comparisons,
    forms,
)
