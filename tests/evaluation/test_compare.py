"""Comparing evaluation jobs: intervals that cover, paired differences, and the page."""

import base64
import csv
import dataclasses
import io
import json
import re

import mini_data
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.cli.report import main
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.evaluation.bootstrap import bootstrap_mean
from internvlx_jax.evaluation.compare import compare
from internvlx_jax.evaluation.records import Row, Summary, write_rows

QUESTIONS = 400


def covered(draw) -> float:
    """Share of 200 simulated models whose 95 % interval holds the true mean of their scores."""
    rng = np.random.default_rng(16)
    hits = 0
    for _ in range(200):
        truth, values = draw(rng)
        interval = bootstrap_mean(values, resamples=2000)
        hits += interval.low <= truth <= interval.high
    return hits / 200


def test_intervals_hold_the_accuracy_of_simulated_models():
    def model(rng):
        accuracy = rng.uniform(0.2, 0.9)
        return accuracy, rng.random(QUESTIONS) < accuracy

    assert 0.92 <= covered(model) <= 0.98


def test_intervals_hold_differences_of_simulated_pairs():
    """Two models share most of their mistakes, as models of one family do."""

    def pair(rng):
        a, b = rng.uniform(0.3, 0.9, 2)
        hard = rng.random(QUESTIONS)
        own = rng.random(QUESTIONS) < 0.3
        second = np.where(own, rng.random(QUESTIONS), hard)
        return a - b, (hard < a).astype(float) - (second < b)

    assert 0.92 <= covered(pair) <= 0.98


def test_intervals_hold_soft_scores():
    values, weights = np.array([0, 0.3, 0.6, 0.9, 1]), np.array([0.4, 0.1, 0.1, 0.1, 0.3])

    def model(rng):
        return float(values @ weights), rng.choice(values, QUESTIONS, p=weights)

    assert 0.92 <= covered(model) <= 0.98


def test_the_bootstrap_is_that_of_drawn_questions():
    """Drawing counts of distinct values is drawing questions with replacement."""
    values = np.array([0, 0.3, 1, 1, 0.6, 0, 1, 0.9, 0.3, 0])
    interval = bootstrap_mean(values, resamples=40_000)
    rng = np.random.default_rng(1)
    means = rng.choice(values, (40_000, len(values))).mean(axis=1)
    assert np.allclose((interval.low, interval.high), np.percentile(means, (2.5, 97.5)), atol=0.011)
    assert interval.mean == pytest.approx(values.mean())
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values[::-1], seed=3)
    always = bootstrap_mean([1.0] * 5)
    assert (always.low, always.mean, always.high) == (1, 1, 1)


def row(index, score, **changes) -> Row:
    return dataclasses.replace(
        Row(
            index=index,
            question_id=10 + index,
            prompt=f"Question <{index}>?",
            images=[],
            tiles=1,
            prompt_tokens=5,
            new_tokens=2,
            finish="stop",
            raw=f"answer & {index}",
            prediction=f"answer & {index}",
            answer=["red", "dark red"],
            score=score,
            error=None,
        ),
        **changes,
    )


def write(root, model, scores, *, task="textvqa_val", headline=None, judge=None, rows=None):
    """Writes a finished task of `internvlx eval`."""
    folder = root / model / task
    folder.mkdir(parents=True)
    rows = rows or [row(i, score) for i, score in enumerate(scores)]
    known = [row.score for row in rows if row.score is not None]
    mean = 100 * sum(known) / len(known) if known else None
    summary = Summary(
        task=task,
        title=task,
        protocol="internvl",
        model=model,
        score=mean if headline is None else headline,
        parts={},
        samples=len(rows),
        errors=sum(row.error is not None for row in rows),
        stopped_by_length=0,
        notes=[],
        judge=judge,
        compat=[],
        files=[],
        settings={},
        settings_hash="0",
        versions={},
    )
    write_rows(folder / "predictions.jsonl", rows)
    write_json(folder / "summary.json", summary.to_json())
    return root / model


def only(comparison, model):
    (cell,) = comparison.cells
    return comparison.entries[cell, model]


def test_differences_are_paired(tmp_path):
    """Ten questions more of the same 400 are certain, although both intervals overlap."""
    right = [1.0] * 200 + [0.0] * 200
    a = write(tmp_path, "a", right)
    b = write(tmp_path, "b", [1.0] * 210 + [0.0] * 190)
    comparison = compare([a, b])
    first, second = only(comparison, "a"), only(comparison, "b")
    assert first.interval.high > second.interval.low and first.difference is None
    difference = second.difference
    assert (difference.questions, difference.better, difference.worse) == (400, 10, 0)
    assert difference.interval.mean == pytest.approx(2.5) and not difference.interval.holds_zero
    assert second.is_headline and not second.notes
    turned = compare([a, b], baseline="b")
    assert turned.models == ("b", "a")
    assert only(turned, "a").difference.interval.mean == pytest.approx(-2.5)


def test_questions_are_matched_by_their_ids(tmp_path):
    a = write(tmp_path, "a", [], rows=[row(i, float(i < 3)) for i in range(6)])
    b = write(tmp_path, "b", [], rows=[row(i, float(i < 3)) for i in (5, 4, 3, 2)])
    entry = only(compare([a, b]), "b")
    assert (entry.difference.questions, entry.difference.interval.mean) == (4, 0)
    assert entry.notes == ("difference over 4 common questions of 4, and 6 of the baseline",)


def test_rotations_are_one_question(tmp_path):
    ids = (1, 1_000_001, 2, 1_000_002, 3)
    rows = [row(i, s, question_id=id) for i, (id, s) in enumerate(zip(ids, (1, 0, 1, 1, 1)))]
    a = write(tmp_path, "a", [], rows=rows, task="mmbench_dev_en", headline=200 / 3)
    entry = only(compare([a]), "a")
    assert entry.interval.mean == pytest.approx(200 / 3) and entry.is_headline


def test_what_cannot_be_compared_says_why(tmp_path):
    a = write(tmp_path / "1", "a", [1.0, 0.0], judge={"model": "x", "dates": []})
    b = write(tmp_path / "1", "b", [1.0, 0.0], judge={"model": "y", "dates": []})
    assert only(compare([a, b]), "b").notes == ("no difference: judged by y, the baseline by x",)
    c = write(tmp_path / "1", "c", [1.0, 1.0], rows=[row(0, 1.0, answer=["blue"]), row(1, 1.0)])
    d = write(tmp_path / "1", "d", [1.0, 1.0])
    assert "question 10 has other references" in only(compare([c, d]), "d").notes[0]
    e = write(tmp_path / "1", "e", [None, None], judge="pending")
    assert (only(compare([e]), "e").interval, only(compare([e]), "e").notes) == (
        None,
        ("waits for a judge",),
    )
    assert only(compare([d, e]), "e").difference is None
    f = write(tmp_path / "1", "f", [1.0, 0.0], headline=0.25)
    assert "interval is that of the mean score" in only(compare([f]), "f").notes[0]


def test_models_of_one_name_are_told_apart(tmp_path):
    a = write(tmp_path / "1", "run", [1.0])
    b = write(tmp_path / "2", "run", [0.0])
    assert compare([a, b]).models == (f"run ({a})", f"run ({b})")
    assert compare([a, a]).models == ("run",)


def test_the_command_writes_table_and_page(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.png"
    Image.new("RGB", (900, 300), (10, 200, 30)).save(page)
    tsv = mini_data.Writer(tmp_path)
    tsv.tsv("T", [{"index": 7, "question": "q", "image": tsv.base64()}])
    images = [[str(page)], [f"{tmp_path / 'tsv' / 'T.tsv'} row 7"], ["nowhere.png"], []]
    ours = [row(i, 1.0, images=names) for i, names in enumerate(images)]
    theirs = [dataclasses.replace(each, score=0.0) for each in ours]
    theirs[3] = dataclasses.replace(ours[3], score=0.9, raw="<b>almost</b>")
    write(tmp_path / "out", "a", [], rows=theirs)
    write(tmp_path / "out", "b", [], rows=ours)
    status = main(["eval", str(tmp_path / "out"), "--resamples", "200", "--worst", "4"])
    shown = capsys.readouterr().out
    assert status == 0 and "| textvqa_val | internvl | 22.50 [" in shown
    lines = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(line["model"], line["baseline"]) for line in lines] == [("a", ""), ("b", "a")]
    assert float(lines[1]["difference"]) == pytest.approx(77.5) and lines[1]["better"] == "4"
    assert (tmp_path / "out" / "comparison.md").read_text() in shown
    text = (tmp_path / "out" / "comparison.html").read_text()
    assert text.count("<article>") == 4 and "1 images could not be read" in text
    assert text.index("Question &lt;0&gt;?") < text.index("Question &lt;3&gt;?"), "largest first"
    assert "&lt;b&gt;almost&lt;/b&gt;" in text and "<b>" not in text
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in pictures]
    assert len(sizes) == 2 and sizes[0] == (320, 107)


def test_bad_input_is_one_line(tmp_path, capsys):
    a = write(tmp_path, "a", [1.0])
    assert main(["eval", str(tmp_path / "none")]) == 1
    assert "does not exist; give the --out_dir" in capsys.readouterr().err
    assert main(["eval", str(a), "--baseline", "aa"]) == 1
    assert 'Did you mean "a"?' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(a), "--worst", "-1"])
    (a / "textvqa_val" / "summary.json").write_text(json.dumps({"task": "x"}))
    with pytest.raises(ConfigError, match="summary.json: no .*; run eval.py again"):
        compare([a])
