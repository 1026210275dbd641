"""The examples of docs/inference.md and of README run as they stand, on the tiny model."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(run_folder, pixels, tmp_path, monkeypatch):
    """A working folder with what the examples name."""
    run = tmp_path / "runs" / "demo" / "train"
    run.parent.mkdir(parents=True)
    os.symlink(run_folder, run)
    Image.fromarray(pixels).save(tmp_path / "page.png")
    Image.fromarray(pixels[::-1]).save(tmp_path / "other.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page, fewest", [("README.md", 1), ("docs/inference.md", 11)])
def test_the_examples_run(page, fewest, folder, capsys):
    blocks = [b for b in BLOCK.findall((ROOT / page).read_text()) if "ivx" in b or fewest > 1]
    assert len(blocks) >= fewest
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out.strip()
