"""Whatever a file or a flag holds: a right result, or one message that names a path or a field.

Files and flags of every kind (fuzz_kinds.py) are changed at random and given to the commands. The
property: exit status 0 with every sample used or counted, or 1 (2 for usage) with one message on
stderr; no other exception, and nothing half-written. Run one input again by its number:

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
from fuzz import mutate_json
from fuzz_kinds import KINDS, RECORDS, configs, safetensors
from PIL import Image

import internvlx_jax.cli.train as train_command
from internvlx_jax.core import remote
from internvlx_jax.core.paths import as_path

INPUTS = int(os.environ.get("FUZZ_INPUTS", "900"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
CHUNKS = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for name in ("0.png", "1.jpg", "frames/1.png", "frames/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def stored(gcs, pictures):
    """Copies the pictures into the bucket of the emulator, with records about them."""
    for name in ("0.png", "1.jpg"):
        as_path(f"gs://bucket/fuzz/{name}").write_bytes((pictures / name).read_bytes())
    text = "".join(json.dumps(each) + "\n" for each in RECORDS[:3])
    as_path("gs://bucket/fuzz/d.jsonl").write_bytes(text.encode())


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
def test_every_input_is_used_or_refused_in_one_line(chunk, pictures, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("internvlx_jax.training.loop.train", lambda config, **_: None)
    monkeypatch.setattr(train_command.distributed, "start_from", lambda args: 0)
    monkeypatch.setattr(sys, "argv", ["internvlx"])
    monkeypatch.setattr(remote, "PROBE_SECONDS", 2)  # of a server that is on this machine
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
