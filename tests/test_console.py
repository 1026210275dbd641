"""What all commands share: the console log, flags with hints, and no search for a missing TPU."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvlx_jax.cli import console
from internvlx_jax.cli.console import (
    INTERRUPTED,
    CommandParser,
    add_config_flags,
    configure_logging,
    run_command,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("process, told", [(0, "step 1\n"), (1, "")])
def test_the_first_process_narrates_and_all_warn(process, told, capsys):
    configure_logging()
    configure_logging(process)
    logging.getLogger("internvlx_jax.training.loop").info("step %d", 1)
    logging.getLogger("internvlx_jax.data").warning("odd")
    logging.getLogger("another").info("not ours")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (told, "warning: odd\n")


def parser():
    parser = CommandParser(prog="internvlx test")
    add_config_flags(parser, "a=1")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("--decode", action="store_true")
    commands.add_parser("show").add_argument("--rule", choices=("edge", "area"))
    return parser


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config", "x", "check", "--decoed"],
            'unknown argument --decoed. Did you mean "--decode"?',
        ),
        (["--config", "x", "check", "--cofnig=y"], '--cofnig=y. Did you mean "--config"?'),
        (["--config", "x", "chek"], 'Did you mean "check"?'),
        (["--config", "x", "show", "--rule", "edeg"], 'Did you mean "edge"?'),
        (["--confg", "x", "check"], 'unknown argument --confg. Did you mean "--config"?'),
        (["check"], "required: --config"),
    ],
)
def test_misspelled_flags_get_a_hint(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_right_flags_are_taken():
    args = parser().parse_args(["--set", "a=1", "b=2", "--config", "x", "check", "--decode"])
    assert args.decode and args.settings == ["a=1", "b=2"] and args.command == "check"


@pytest.mark.parametrize(
    "nodes, plugins, platforms",
    [
        ([], [], "cpu"),
        ([], ["xla_cuda13"], "cpu"),
        (console.GPU_NODES, ["xla_cuda13"], "cuda,cpu"),
        (console.GPU_NODES, [], "cpu"),
        (console.TPU_NODES, [], None),
        ([], ["other"], None),
    ],
)
def test_platforms_follow_the_device_nodes(nodes, plugins, platforms, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr(console, "find_spec", lambda name: object())
    monkeypatch.setattr(console, "_any_node", lambda patterns: bool({*patterns} & {*nodes}))
    entries = [type("Entry", (), {"name": name}) for name in plugins]
    monkeypatch.setattr(console, "entry_points", lambda group: entries)
    configure_logging()
    assert os.environ.get("JAX_PLATFORMS") == platforms


def test_a_chosen_platform_stays(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    configure_logging()
    assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_commands_make_no_noise_without_a_tpu():
    """jax is imported first, as commands do; then nothing but the devices is printed."""
    code = (
        "import jax\n"
        "from internvlx_jax.cli.console import configure_logging\n"
        "configure_logging()\n"
        "print(jax.default_backend())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "cpu":
        assert done.stderr == ""


@pytest.mark.parametrize("delay", [0, 0.2])
def test_ctrl_c_is_not_lost_in_a_destructor(delay, capfd, monkeypatch):
    start = console._thread.start_new_thread

    def start_on_a_busy_machine(*args):
        start(*args)
        time.sleep(delay)

    monkeypatch.setattr(console._thread, "start_new_thread", start_on_a_busy_machine)

    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command():
        Interrupted()
        time.sleep(60)

    # A shell lets what it starts in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command(command, interrupted="stopped") == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "\nstopped\n"
