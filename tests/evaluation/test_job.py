"""One job on a tiny random model: batches and devices change nothing, errors are counted."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.synthetic import FILES, SyntheticConfig, generate
from internvlx_jax.evaluation.job_config import JudgeConfig

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """Writes questions on generated pages, one without an image and one on two pages."""
    folder = tmp_path_factory.mktemp("job") / "data"
    generate(
        folder, SyntheticConfig(train_samples=1, val_samples=3, text_share=0.0, two_page_share=0.0)
    )
    path = folder / FILES["val_vqa"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pages = sorted({row["image"] for row in rows})
    rows.insert(
        3, {"question_id": "text", "question": "Which number comes after 3?", "answer": "4"}
    )
    rows.append(
        {
            "question_id": "two",
            "question": "<image> and <image>?",
            "answer": "x",
            "image": pages[:2],
        }
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run_job(configure, run_on, questions, tmp_path_factory):
    """Returns a function that runs a job -> (summary, bytes of predictions.jsonl, its rows).

    `devices` limits the mesh to the first ones.
    """

    def run(*, devices=1, **settings):
        config = configure(
            **dict(
                data=str(questions),
                metric="exact",
                max_new_tokens=NEW_TOKENS,
                batch_size=1,
                out_dir=tmp_path_factory.mktemp("job") / "out",
            )
            | settings
        )
        (summary,) = run_on(config, devices)
        predictions = (Path(config.out_dir) / "predictions.jsonl").read_bytes()
        stored = json.loads((Path(config.out_dir) / "summary.json").read_text())
        assert stored == json.loads(json.dumps(summary.to_json()))
        how = json.loads((Path(config.out_dir) / "run.json").read_text())
        return (
            summary.to_json() | {"run": how},
            predictions,
            [json.loads(line) for line in predictions.splitlines()],
        )

    return run


@pytest.fixture(scope="session")
def one_by_one(run_job):
    return run_job(batch_size=1)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_stand_in_the_order_of_the_file(one_by_one, questions, checkpoint):
    _, _, rows = one_by_one
    for row, asked in zip(rows, read(questions), strict=True):
        assert (row["question_id"], row["prompt"]) == (asked["question_id"], asked["question"])
        assert row["answer"] == [asked["answer"]]
        images = asked.get("image", [])
        images = [images] if isinstance(images, str) else images
        assert row["images"] == [str(questions.parent / image) for image in images]
        assert (row["tiles"] > 0) == bool(images)
        assert row["score"] == float(row["prediction"].lower() == asked["answer"].lower())
        assert row["error"] is None
    assert {row["tiles"] for row in rows} == {0, 2, 3}


def test_a_random_model_answers_each_question_in_its_own_way(one_by_one):
    """Otherwise the comparisons below would compare nothing."""
    _, _, rows = one_by_one
    assert len({row["prediction"] for row in rows}) > len(rows) // 2
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert len({row["new_tokens"] for row in rows}) > 2
    assert all(0 < row["new_tokens"] <= NEW_TOKENS for row in rows)
    assert all(row["new_tokens"] == NEW_TOKENS for row in rows if row["finish"] == "length")


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 7},
        {"batch_size": 16, "devices": 8, "mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
    ],
    ids=["batch of 7", "batch of 16 on 8 devices"],
)
def test_batches_and_devices_do_not_change_a_byte(settings, one_by_one, run_job, capsys):
    summary, predictions, _ = run_job(**settings)
    assert predictions == one_by_one[1]
    total = len(one_by_one[2])
    assert f"{total}/{total}" in capsys.readouterr().err, "the bar ends at the last answer"
    assert summary["run"]["executables"] == one_by_one[0]["run"]["executables"]
    assert {name: value for name, value in summary.items() if name != "run"} == {
        name: value for name, value in one_by_one[0].items() if name != "run"
    }


def test_the_summary_says_what_was_measured(one_by_one, questions, checkpoint):
    summary, _, rows = one_by_one
    assert summary["score"] == np.mean([row["score"] for row in rows])
    assert (summary["settings"]["metric"], summary["samples"], summary["errors"]) == (
        "exact",
        len(rows),
        0,
    )
    assert summary["stopped_by_length"] == sum(row["finish"] == "length" for row in rows)
    settings = summary["settings"]
    assert (settings["checkpoint"], settings["data"]) == (str(checkpoint), str(questions))
    assert settings["tiles"] == dataclasses.asdict(RunFolder(checkpoint).config.prompt.tiles)
    assert settings["template"] == "internlm2-chat"
    (sha,) = settings["data_sha256"].values()
    assert (
        sha == hashlib.sha256(questions.read_bytes()).hexdigest()
        and summary["versions"]["jax"] == jax.__version__
    )
    run = summary["run"]
    assert run["executables"] == 2, "text, and three tiles"
    assert run["seconds"] > 0 and run["speed"]["new_tokens"] == sum(
        row["new_tokens"] for row in rows
    )
    assert all(value > 0 for value in run["speed"].values())


def test_a_failed_question_is_an_error_row_that_counts_as_wrong(
    run_job, one_by_one, questions, tmp_path
):
    """Errors show in the header, when decoded beside a good row, or as a prompt too long."""
    page, text = read(questions)[0], read(questions)[3]
    page["image"] = str(questions.parent / page["image"])
    broken, floats = tmp_path / "broken.png", tmp_path / "floats.tiff"
    broken.write_bytes(b"not an image")
    Image.new("F", (60, 60)).save(floats)
    data = tmp_path / "questions.jsonl"
    asked = [
        page | {"question_id": "broken", "image": str(broken), "answer": ""},
        page,
        page | {"question_id": "floats", "image": str(floats)},
        text | {"question_id": "long", "question": "a" * 2999},
        text,
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    summary, _, rows = run_job(data=str(data), batch_size=7)
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked]
    good, failed = [rows[1], rows[4]], [rows[0], rows[2], rows[3]]
    assert [row["prediction"] for row in good] == [one_by_one[2][i]["prediction"] for i in (0, 3)]
    assert not any(row["error"] for row in good)
    problems = [
        f"line 1: {broken}: the image cannot be read",
        f'line 3: {floats}: image mode "F"',
        "line 4: a prompt of ",
    ]
    for row, problem in zip(failed, problems):
        assert row["error"].startswith(f"{data} {problem}")
        assert (row["score"], row["prediction"], row["finish"], row["new_tokens"]) == (
            0.0,
            "",
            "error",
            0,
        )
    assert (summary["errors"], summary["samples"]) == (3, 5)
    assert summary["score"] == sum(row["score"] for row in good) / 5, (
        "an empty text is no right answer to anything"
    )


def test_a_job_in_which_everything_fails_still_reports(run_job, questions, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(read(questions)[0] | {"image": "gone.png"}) + "\n")
    summary, _, (row,) = run_job(data=str(data))
    assert (summary["errors"], summary["score"], summary["run"]["executables"]) == (1, 0.0, 0)
    assert "gone.png" in row["error"]


def test_settings_replace_those_of_the_checkpoint(run_job, questions, tmp_path):
    data = tmp_path / "questions.jsonl"
    row = read(questions)[0]
    data.write_text(json.dumps(row | {"answer": ["x", row["answer"]]}) + "\n")
    summary, _, (answered,) = run_job(
        data=str(data),
        image_root=str(questions.parent),
        dynamic=False,
        limit=1,
        prompt="Q: {question}",
        metric="anls",
    )
    assert (answered["tiles"], answered["prompt"]) == (1, f"Q: {row['question']}")
    assert answered["answer"] == ["x", row["answer"]]
    assert (
        summary["settings"]["tiles"]["dynamic"] is False and summary["settings"]["metric"] == "anls"
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"metric": "exakt"},
            "metric 'exakt' is unknown; Did you mean \"exact\"? choose one of exact, anls",
        ),
        ({"metric": None}, "data and metric belong together"),
        ({"data": None, "metric": None}, "nothing to evaluate"),
        ({"protocol": "intervl"}, 'Did you mean "internvl"?'),
        ({"compat": "swap"}, "compat 'swap' is unknown"),
        ({"shard": "4/4"}, "shard is '4/4'; give i/n"),
        ({"judge": dict(url="u")}, "judge_url and judge_model belong together"),
        ({"prompt": "Read."}, "does not contain {question}"),
        ({"batch_size": 0}, "batch_size is 0, it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"max_num": 0}, "max_num is 0"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message, configure):
    with pytest.raises(ConfigError) as error:
        judge = JudgeConfig(**settings.pop("judge", {}))
        configure("o", **dict(data="d", metric="exact", judge=judge) | settings)
    assert message in str(error.value)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_both_files(checkpoint, questions, one_by_one, tmp_path):
    out = tmp_path / "out"
    process = subprocess.run(
        [
            sys.executable,
            str(ROOT / "eval.py"),
            "--checkpoint",
            str(checkpoint),
            "--data",
            str(questions),
            "--metric",
            "exact",
            "--out_dir",
            str(out),
            "--dtype",
            "float32",
            "--batch_size",
            "3",
            "--max_new_tokens",
            str(NEW_TOKENS),
            "--limit",
            "3",
            "--mesh_data",
            "8",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("exact 0.0000 on 3 samples, 0 errors; see ")
    assert (out / "predictions.jsonl").read_bytes().splitlines() == one_by_one[1].splitlines()[:3]
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.jsonl",
        "run.json",
        "summary.json",
    ]


def test_wrong_input_is_one_line_and_leaves_nothing(command, checkpoint, questions, tmp_path):
    for flags, message in [
        ({"checkpoint": "nowhere", "data": questions}, "error: nowhere: no such folder"),
        (
            {"checkpoint": checkpoint, "data": "gone.jsonl"},
            "error: question file gone.jsonl does not exist",
        ),
        ({"checkpoint": checkpoint, "data": questions, "batch_size": 0}, "error: batch_size is 0"),
    ]:
        status, _, error = command(metric="exact", **flags)
        assert (status, error.count("\n")) == (1, 1)
        assert error.startswith(message)
        assert not (tmp_path / "out").exists()


def test_an_unknown_metric_lists_the_known_ones(command, checkpoint, questions, tmp_path):
    status, _, error = command(checkpoint=checkpoint, data=questions, metric="exakt")
    assert (
        status not in (0, None)
        and "anls" in error.splitlines()[-1]
        and "exact" in error.splitlines()[-1]
    )
    assert not (tmp_path / "out").exists()


def test_failed_questions_show_in_the_exit_status(command, checkpoint, questions, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(read(questions)[0] | {"image": "gone.png"}) + "\n")
    assert command(checkpoint=checkpoint, data=data, dtype="float32", metric="exact")[0] == 3
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["errors"] == 1
