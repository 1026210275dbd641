"""The scripts of launch/ parse, and their dry mode prints commands with flags that train.py has."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = ["--config", "configs/demo.py", "--set", "output_dir=/shared/my run"]
VARIABLES = {
    "NAME": "mine",
    "ZONE": "here",
    "TYPE": "v5litepod-256",
    "CLUSTER": "pods",
    "WORKLOAD": "w",
    "IMAGE": "i:1",
}


def dry(script, *args, **variables):
    """The lines that a script prints instead of running them."""
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *args],
        text=True,
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "DRY": "1"} | VARIABLES | variables,
    )
    return done.stdout.splitlines()


def train_flags():
    help_text = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], text=True, capture_output=True, check=True
    ).stdout
    return set(re.findall(r"--[a-z_]+", help_text))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").iterdir()))
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
    assert os.access(ROOT / "launch" / script, os.X_OK)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, args, variables, lines",
    [
        ("local.sh", ("2", "4", "train.py", *TRAIN), {}, 2),
        ("slurm.sh", TRAIN, {}, 1),
        ("tpu_vm.sh", ("train", *TRAIN), {}, 1),
        ("tpu_vm.sh", ("train", *TRAIN), {"SLICES": "3"}, 3),
        ("xpk.sh", TRAIN, {"SLICES": "2"}, 1),
    ],
    ids=["local", "slurm", "tpu", "three slices", "xpk"],
)
def test_commands_use_flags_of_train(script, args, variables, lines):
    printed = dry(script, *args, **variables)
    assert len(printed) == lines
    for line in printed:
        flags = set(re.findall(r"(?<=\s)--[a-z_]+", line.partition("train.py")[2]))
        assert {"--config", "--set", "--coordinator"} <= flags <= train_flags(), line


def test_remote_commands_keep_their_words():
    (line,) = dry("tpu_vm.sh", "train", *TRAIN)
    assert "output_dir=/shared/my run" in shlex.split(line.partition("--command ")[2])


def test_a_tpu_is_asked_for_and_given_back():
    (line,) = dry("tpu_vm.sh", "create", "--spot")
    assert (
        "queued-resources create mine --zone here --node-id mine --accelerator-type v5litepod-256"
        in line
    )
    assert line.endswith("--spot")
    assert "--node-count 2 --node-prefix mine" in dry("tpu_vm.sh", "create", SLICES="2")[0]
    assert "queued-resources delete mine" in dry("tpu_vm.sh", "delete")[0]
