"""The check table, its histograms and the page of one sample (design: data.md 18)."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.cli import data as command
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER


def chat(question: str, answer: str) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


@pytest.fixture
def meta(tmp_path):
    """Two images (a wide one, and one of which half can be decoded), a text with markup, two bad
    lines.
    """
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 112, 3), np.uint8)).save(tmp_path / "wide.png")
    Image.fromarray(rng.integers(0, 256, (56, 73, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    lines = [
        {"image": "wide.png", **chat("What?", "A <b>bold</b> word.")},
        {"image": "cut.png", **chat("What?", "Half.")},
        chat("Hello & goodbye.", "Good."),
        {"image": "gone.png", **chat("What?", "Nothing.")},
        {},
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"pages": {"root": str(tmp_path), "annotation": "chat.jsonl"}}))
    return path


@pytest.fixture
def run(meta, monkeypatch, capsys, tmp_path):
    def run(name, *args):
        """-> exit status, what is printed, what is printed as error."""
        words = [
            "data",
            name,
            str(meta),
            "--tokenizer",
            str(TOKENIZER_FOLDER),
            "--tile_size",
            "56",
            "--tokens_per_tile",
            "4",
            "--out",
            str(tmp_path / "out"),
            *args,
        ]
        monkeypatch.setattr(sys, "argv", words)
        status = command.main()
        return status, *capsys.readouterr()

    return run


def test_the_table_counts_everything(run, tmp_path):
    status, printed, _ = run("check", "--set", "max_length=256")
    assert status == 0
    for expected in (
        "samples           3 of 5 records, 2 images",
        "tiles per sample  0:1  1:1  3:1",
        "bad samples       json:1  unreadable:1",
        "made to fit       none",
        "against rule off  6 tiles (60.0%) and 24 tokens",
    ):
        assert expected in printed, printed
    assert re.search(
        r"bucket +padded tokens +\d+\.\d%  padded tiles +0\.0%  executables 3", printed
    )
    assert re.search(
        r"pack +padded tokens +\d+\.\d%  padded tiles +\d+\.\d%  executables 1", printed
    )
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    found = report["datasets"]["pages"]
    assert found["tiles"] == {"0": 1, "1": 1, "3": 1} and sum(found["lengths"].values()) == 3
    assert found["bad"] == {"json": 1, "unreadable": 1} and found["supervised_tokens"] > 5


def test_decoding_finds_what_headers_hide(run):
    assert "truncated" not in run("check", "--set", "max_length=256")[1]
    assert (
        "bad samples       json:1  unreadable:1  truncated:1"
        in run("check", "--decode", "--set", "max_length=256")[1]
    )


def test_a_page_shows_tiles_prompt_and_labels(run, tmp_path):
    status, printed, _ = run("show", "--sample", "0", "--set", "max_length=256")
    page = (tmp_path / "out" / "sample-0.html").read_text()
    assert status == 0 and printed.strip() == str(tmp_path / "out" / "sample-0.html")
    tiles = sorted((tmp_path / "out").glob("*.png"))
    assert len(tiles) == 3 and all(Image.open(tile).size == (56, 56) for tile in tiles)
    assert all(tile.name in page for tile in tiles) and "&lt;IMG_CONTEXT&gt; x 12" in page
    learnt = re.findall(r'<span class="learn" title="\d+">(.*?)</span>', page)
    assert (
        "".join(learnt).replace("\u2581", " ") == "A &lt;b&gt;bold&lt;/b&gt; word.&lt;|im_end|&gt;"
    )
    assert "&lt;|im_start|&gt;" in "".join(
        re.findall(r'<span class="masked" title="\d+">(.*?)</span>', page)
    )
    assert "<b>" not in page, "texts of the data are escaped"


def test_a_text_sample_and_a_packed_setting(run, tmp_path):
    assert run("show", "--sample", "2", "--set", "max_length=256", "batch_mode=pack")[0] == 0
    assert "Hello &amp; goodbye." in (tmp_path / "out" / "sample-2.html").read_text()
    assert "0 tiles" in (tmp_path / "out" / "sample-2.html").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["show", "--sample", "9"], "--sample 9: there are samples 0 to 2"),
        (["check", "--set", "max_lenght=5"], "did you mean max_length"),
        (["check", "--config", "nowhere.py"], "no such file"),
    ],
)
def test_errors_are_one_line(words, message, run):
    status, _, errors = run(*words)
    assert status == 1 and "error: " in errors and message in errors


def test_a_run_config_says_how_its_model_reads(meta, tmp_path, monkeypatch, capsys):
    config = str(Path(__file__).parents[2] / "configs" / "demo.py")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "data",
            "check",
            str(meta),
            "--config",
            config,
            "--tokenizer",
            str(TOKENIZER_FOLDER),
            "--out",
            str(tmp_path),
        ],
    )
    assert command.main() == 0, capsys.readouterr()
    assert "tiles per sample  0:1  1:2" in capsys.readouterr().out
