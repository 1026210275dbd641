"""docs/evaluation.md: its flags, names and examples are real."""

import fnmatch
import re
import shlex

import pytest
from mini_data import ROOT
from published_columns import NEEDED

from internvlx_jax.cli.chat import main as chat
from internvlx_jax.cli.evaluate import parser
from internvlx_jax.cli.report import comparison_parser
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.scoring import COMPAT
from internvlx_jax.evaluation.sources import Roots

TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_flags_exist(capsys):
    known = {*parser()._option_string_actions, *comparison_parser()._option_string_actions}
    named = set(re.findall(r"`(--\w+)", TEXT)) | {
        word
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
        if "internvlx eval" in line
        for word in shlex.split(line)
        if word.startswith("--")
    }
    assert len(named) > 15 and not named - known
    with pytest.raises(SystemExit):
        chat(["--help"])
    chats = [
        line for _, block in BLOCKS for line in block.splitlines() if "internvlx_jax.chat" in line
    ]
    assert chats and all(
        word in capsys.readouterr().out for word in re.findall(r"--\w+", chats[0])[:1]
    )


def test_deviations_are_listed():
    assert re.findall(
        r"^\| `(\w+)` \| \w+", TEXT.partition("## Deviations")[2], re.MULTILINE
    ) == list(COMPAT)


def test_columns_of_every_tsv_file_are_listed():
    rows = re.findall(r"^\| ([^|]*[A-Z][^|]*) \| ([^|]*) \|$", TEXT, re.MULTILINE)
    for dataset, needed in NEEDED.items():
        file = re.sub(r"_\d+frame$", "", dataset)
        listed = [
            row
            for files, row in rows
            if any(fnmatch.fnmatchcase(file, n) for n in files.split(", "))
        ]
        columns = {"index", "image", "question", *re.findall(r"`([\w-]+)`", " ".join(listed))}
        assert listed and not {*needed} - columns, file


def test_files_exist():
    named = re.findall(r"`((?:internvlx_jax|tests|benchmarks)/[\w./]+)`", TEXT)
    assert len(named) > 3 and not [path for path in named if not (ROOT / path).exists()]


def test_examples_run(data_root):
    selection, task = (block for language, block in BLOCKS if language == "python")
    names = {}
    exec(selection, names)
    assert isinstance(names["evaluation"], EvaluationConfig)
    exec(task, names)
    (task,) = names["TASKS"]
    roots = Roots(data_root, data_root / "tsv")
    assert task.protocols["internvl"].source.missing(roots) == [data_root / "signs" / "val.jsonl"]
    assert (
        task.default_protocol == "internvl" and task.protocols["vlmevalkit"].max_new_tokens == 4096
    )
