"""From TSV files with the published columns to the files that VLMEvalKit scores.

(design: evaluation.md 5, 7, 8) Columns are those that VLMEvalKit e8e78f05 reads.
"""

import csv
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mini_benchmarks
import openpyxl
import pytest
from mini_data import read_rows

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.job import make_judge, rescore
from internvlx_jax.evaluation.job_config import JudgeConfig
from internvlx_jax.evaluation.judge import RequestBudget
from internvlx_jax.evaluation.records import read_rows as stored_rows
from internvlx_jax.evaluation.scoring import ScoringError
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.task_run import TaskRun
from internvlx_jax.evaluation.tasks import SUITES, TASKS

# What VLMEvalKit's evaluate() reads of MODEL_DATASET.xlsx, besides index, question and prediction.
CHOICE = ["answer", "A", "B"]
READ = {
    "textvqa_val": ["answer"],
    "docvqa_val": ["answer"],
    "infovqa_val": ["answer"],
    "gqa_testdev": ["answer"],
    "vizwiz_val": ["answers"],
    "chartqa_human": ["answer", "split"],
    "mmbench_dev_en": CHOICE,
    "ai2d_test": CHOICE,
    "scienceqa": CHOICE,
    "realworldqa": CHOICE,
    "seed": CHOICE,
    "mmmu_val": [*CHOICE, "category", "split"],
    "mme": ["answer", "category", "image_path"],
    "pope": ["answer", "category"],
    "hallusionbench": ["answer", "category", "l2-category"],
    "mathvista": [
        *("answer", "question_type", "answer_type", "choices", "answer_option", "task", "skills"),
    ],
    "mmvet": ["answer", "category"],
    "llavabench": ["gpt4_ans", "caption", "category"],
}
READ |= mini_benchmarks.READ
PROTOCOL = "vlmevalkit"


@pytest.fixture(scope="module")
def endpoint():
    """Starts a judge that fails twice and then answers every prompt in its own way."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked += 1
                status = 503 if server.asked <= server.failures else 200
            prompt = body["messages"][-1]["content"]
            starts = {"\nCompare": "0.5", "[Context]": "8 4", "\nPlease read": "3"}
            reply = next((starts[text] for text in starts if prompt.startswith(text)), "A")
            reply = "Yes" if "The options are only Yes / No" in prompt else reply
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.asked, server.failures = 0, 2
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def judged(endpoint, data_root, configure, run_on, tmp_path_factory):
    """All benchmarks of VLMEvalKit, answered and judged -> (folder, summaries by task)."""
    out = tmp_path_factory.mktemp("published") / "out"
    config = configure(
        out,
        tasks=",".join([*READ, "chartqa_aug", "okvqa_val"]),
        protocol=PROTOCOL,
        data_root=str(data_root),
        max_new_tokens=4,
        batch_size=8,
        dynamic=False,
        judge=JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="m"),
    )
    return out / "run", {summary.task: summary for summary in run_on(config)}


def table(path):
    """The rows of PATH.xlsx, or of PATH.tsv where an answer does not fit into xlsx."""
    if path.with_suffix(".tsv").is_file():
        with path.with_suffix(".tsv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    sheet = openpyxl.load_workbook(path.with_suffix(".xlsx")).active
    header, *rows = sheet.iter_rows(values_only=True)
    return [dict(zip(header, row, strict=True)) for row in rows]


def dropped(data_root, tmp_path, dataset, column):
    """Copies a TSV file without one of its columns."""
    csv.field_size_limit(2**31 - 1)
    with (data_root / "tsv" / f"{dataset}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    (tmp_path / "tsv").mkdir(exist_ok=True)
    target = tmp_path / "tsv" / f"{dataset}.tsv"
    with target.open("w", encoding="utf-8", newline="") as file:
        names = [name for name in rows[0] if name != column]
        writer = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("task", READ)
def test_the_first_missing_column_is_named_before_a_model_is_loaded(task, data_root, tmp_path):
    dataset = TASKS[task].protocols[PROTOCOL].dataset
    for column in READ[task]:
        dropped(data_root, tmp_path, dataset, column)
        with pytest.raises(ConfigError, match=f"{dataset}.tsv line 1: no column {column}, which"):
            select(EvaluationConfig(tasks=task, protocol=PROTOCOL, tsv_root=str(tmp_path / "tsv")))


def test_an_answer_column_without_answers_is_an_error(data_root, tmp_path):
    dropped(data_root, tmp_path, "RealWorldQA", "none")
    path = tmp_path / "tsv" / "RealWorldQA.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(row | {"answer": ""} for row in rows)
    with pytest.raises(ConfigError, match="column answer has no value in any row"):
        select(EvaluationConfig(tasks="realworldqa", tsv_root=str(tmp_path / "tsv")))


def test_an_index_without_a_figure_is_an_error(data_root, tmp_path):
    dropped(data_root, tmp_path, "HallusionBench", "none")
    path = tmp_path / "tsv" / "HallusionBench.tsv"
    text = path.read_text(encoding="utf-8").replace("image_VD_illusion_0_0_1", "7")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: index 7 has no set, figure and question"):
        select(EvaluationConfig(tasks="hallusionbench", tsv_root=str(tmp_path / "tsv")))


@pytest.mark.parametrize("task", READ)
def test_every_task_is_judged_and_written_for_vlmevalkit(task, judged, data_root):
    folder, summaries = judged
    summary = summaries[task]
    assert summary.score is not None and summary.errors == 0
    dataset = TASKS[task].protocols[PROTOCOL].dataset
    place = folder if task == "chartqa_human" else folder / task
    rows = table(place / f"run_{dataset}.xlsx")
    assert {"index", "question", "prediction", *READ[task]} <= rows[0].keys()
    with (data_root / "tsv" / f"{dataset}.tsv").open(encoding="utf-8", newline="") as file:
        source = [row["index"] for row in csv.DictReader(file, delimiter="\t")]
    assert [str(row["index"]) for row in rows] == source, "complete, or run.py --mode eval skips it"


def test_judged_scores(judged):
    _, summaries = judged
    assert summaries["mmvet"].score == 50 and summaries["llavabench"].score == 50
    assert summaries["mmvet"].judge["model"] == "m"
    assert summaries["mmmu_val"].samples == 3, "the development split is answered as well"


def test_datasets_that_vlmevalkit_does_not_have_get_no_table(judged):
    folder, _ = judged
    assert not list((folder / "okvqa_val").glob("*.xlsx"))
    without = {"okvqa_val", "vqav2_val", "vqav2_testdev"}
    for name, task in TASKS.items():
        if name in without:
            assert all(not spec.dataset for spec in task.protocols.values())
    assert not TASKS["ai2d_test"].protocols["internvl"].dataset
    assert not TASKS["mmmu_val"].protocols["internvl"].dataset


@pytest.mark.parametrize("task", [name for name in READ if "internvl" in TASKS[name].protocols])
def test_tables_of_internvl_have_what_vlmevalkit_reads(task, data_root):
    """Where VLMEvalKit would not recognize the questions there is no table."""
    (spec,) = select(EvaluationConfig(tasks=task, protocol="internvl", data_root=str(data_root)))
    if task in ("ai2d_test", "scienceqa", "seed") or task.startswith("mmmu"):
        assert not spec.protocol_spec.dataset
        return
    texts = ["x"] * len(spec.questions)
    rows = vlmevalkit_rows(spec.questions, texts, spec.protocol_spec.table)
    assert {"index", "question", "prediction", *READ[task]} - {"split"} <= rows[0].keys()
    assert all(row[name] != "" for row in rows for name in READ[task][:1])
    if task in ("pope", "mme"):
        assert {row["answer"] for row in rows} == {"Yes", "No"}


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.fixture
def answered(judged, data_root, tmp_path):
    """Returns a function: task, its scorer or None -> its rows as a task run in a folder."""

    def answered(task, scorer=None):
        (spec,) = select(EvaluationConfig(tasks=task, protocol=PROTOCOL, data_root=str(data_root)))
        if scorer is not None:
            changed = dataclasses.replace(spec.protocol_spec, score=scorer)
            spec = dataclasses.replace(spec, protocol_spec=changed)
        rows = {row.index: row for row in stored_rows(judged[0] / task / "predictions.jsonl")}
        settings = {"protocol": PROTOCOL, "task": task, "limit": None}
        return TaskRun(spec, tmp_path / task, "run", settings, rows)

    return answered


def test_a_scorer_that_raises_loses_no_answer(answered, data_root, tmp_path):
    def broken(rows, context):
        raise KeyError("capability")

    with pytest.raises(ScoringError, match="mmvet: scoring failed .KeyError: 'capability'"):
        answered("mmvet", broken).finish()
    path = tmp_path / "mmvet" / "predictions.jsonl"
    rows = read_rows(path)
    assert len(rows) == 2 and all(row["score"] is None for row in rows)
    summary = rescore(str(path), data_root=str(data_root))
    assert summary.judge == "pending" and len(read_rows(path)) == 2


def test_data_that_a_scorer_cannot_take_are_refused_before_generation(data_root, monkeypatch):
    def broken(rows, context):
        raise KeyError("capability")

    task = TASKS["mmvet"]
    spec = dataclasses.replace(task.protocols[PROTOCOL], score=broken)
    changed = dataclasses.replace(task, protocols={PROTOCOL: spec})
    monkeypatch.setitem(TASKS, "mmvet", changed)
    with pytest.raises(ConfigError, match="MMVet.tsv cannot be scored .KeyError: 'capability'"):
        select(EvaluationConfig(tasks="mmvet", protocol=PROTOCOL, data_root=str(data_root)))


def test_a_judge_that_goes_away_leaves_the_task_pending(answered, endpoint, tmp_path):
    task_run = answered("mmvet")
    config = JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="n", budget=1)
    summary = task_run.finish(make_judge(config, task_run.folder))
    assert (summary.score, summary.judge) == (None, "pending")
    assert "all 1 requests of --judge_budget are sent" in summary.notes[-2]
    assert len(list((task_run.folder / "judge_cache").iterdir())) == 1, "the reply is kept"
    again = answered("mmvet").finish(
        make_judge(dataclasses.replace(config, budget=1), task_run.folder)
    )
    assert again.score == 50, "one reply from the cache, one asked now"


def test_a_judge_that_is_down_shows_in_the_exit_status(command, checkpoint, data_root, tmp_path):
    status, text, _ = command(
        "--no_dynamic",
        checkpoint=checkpoint,
        tasks="mmvet,pope",
        protocol=PROTOCOL,
        data_root=data_root,
        dtype="float32",
        max_new_tokens=4,
        judge_url="http://localhost:9",
        judge_model="m",
        judge_retries=1,
    )
    assert status == 4 and "| pending |" in text
    for task in ("mmvet", "pope"):
        summary = json.loads((tmp_path / "out" / "run" / task / "summary.json").read_text())
        assert summary["judge"] == "pending" and summary["score"] is None
        assert any("the judge gave no more replies" in note for note in summary["notes"])
        assert len(read_rows(tmp_path / "out" / "run" / task / "predictions.jsonl")) == 2


def test_a_budget_is_shared_by_the_tasks_of_a_job(answered, endpoint):
    budget = RequestBudget(3)
    config = JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="o")
    for task, score in (("mmvet", 50), ("llavabench", None)):
        task_run = answered(task)
        assert task_run.finish(make_judge(config, task_run.folder, budget)).score == score
    assert budget.sent == 3


def test_judge_settings_are_checked():
    for name in ("concurrency", "retries"):
        with pytest.raises(ConfigError, match=f"judge_{name} is 0, it must be at least 1"):
            JudgeConfig(url="u", model="m", **{name: 0})
    with pytest.raises(ConfigError, match="judge_budget is -1"):
        JudgeConfig(budget=-1)


def test_every_benchmark_of_the_suite_is_in_here():
    own = {*READ} - {*mini_benchmarks.READ}
    assert own | {"chartqa_aug", "okvqa_val", "vqav2_val"} == {*SUITES["x20"]}
