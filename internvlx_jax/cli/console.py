"""What all commands share: their output, their flags, and a start without noise."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import glob
import io
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, NoReturn

from internvlx_jax.core.errors import (
    CheckpointError,
    ConfigError,
    SampleError,
    did_you_mean,
)

PACKAGE = "internvlx_jax"
TPU_NODES = ("/dev/accel*", "/dev/vfio/*")
GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/dxg")


INTERRUPTED = 130  # exit status of a program that SIGINT ended, as shells have it
# What a user can act on; anything else is a fault of this package and keeps its traceback.
USER_ERRORS = (ConfigError, CheckpointError, SampleError, OSError)


def run_command(
    command: Callable[[], int | None],
    *also: type[Exception],
    interrupted: str = "interrupted",
    failed: int = 1,
) -> int:
    """Runs a command and returns its exit status; an error of the user is one message.

    Args:
        command: what to do; None is exit status 0.
        also: further errors of the user.
        interrupted: what Ctrl-C is answered with.
        failed: exit status after an error of the user.
    """
    try:
        with _heeding_unraisable():
            return command() or 0
    except (*USER_ERRORS, *also) as error:
        print(f"error: {error}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _heeding_unraisable() -> Iterator[None]:
    """Looks at what is raised where Python prints it and goes on; Ctrl-C is sent again.

    Destructors are such places, callbacks of the garbage collector, of which jax has one, and
    those of tensorstore.
    """
    before = sys.unraisablehook
    running = False  # the hook, which loses a signal as the places do that it is called from

    def send_again() -> None:
        time.sleep(0.05)  # until that place is left
        while running:  # on a busy machine
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def hook(unraisable: Any) -> None:
        nonlocal running
        running = True
        try:
            if issubclass(unraisable.exc_type, KeyboardInterrupt):
                _thread.start_new_thread(send_again, ())  # threading would take a lock
            # What is left of a save that failed, as on a full disk, and has its own message.
            elif str(unraisable.exc_value) != "Event loop is closed":
                before(unraisable)
        finally:
            running = False

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def configure_logging(process: int = 0) -> None:
    """Sends the package's log to the console: plain messages to stdout, warnings to stderr.

    Every command calls it first, and again once it knows its number in a job of several processes.
    It also keeps jax from looking for a TPU on a machine without one, which would print errors of
    the TPU library.

    Args:
        process: Number of this process in its job; only the first one narrates, all of them warn.
    """
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.INFO)
    for handler in [each for each in logger.handlers if isinstance(each, _ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_ConsoleHandler(narrates=process == 0))
    logger.propagate = False  # some libraries give the root logger a handler of their own
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a text gets its escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _skip_absent_tpu()


class _ConsoleHandler(logging.Handler):
    """Writes to whatever sys.stdout and sys.stderr are at that moment, as print does."""

    def __init__(self, *, narrates: bool):
        super().__init__(logging.INFO)
        self._narrates = narrates

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.WARNING:
                print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
            elif self._narrates:
                print(record.getMessage(), flush=True)
        except Exception:
            self.handleError(record)


def _skip_absent_tpu() -> None:
    """Chooses jax's platforms by the device nodes, if libtpu is installed and no TPU is attached.

    jax starts an installed TPU library even where there is nothing for it to drive. A choice of
    the user (JAX_PLATFORMS) and machines with plugins of other vendors are left alone. Compilers
    for TPU topologies are still found, because they do not need the platform.
    """
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None or _any_node(TPU_NODES):
        return
    plugins = {entry.name for entry in entry_points(group="jax_plugins")}
    cuda = {name for name in plugins if "cuda" in name}
    if plugins != cuda:
        return
    platforms = "cuda,cpu" if cuda and _any_node(GPU_NODES) else "cpu"
    os.environ["JAX_PLATFORMS"] = platforms
    if "jax" in sys.modules:  # it has read the variable; its devices are looked for at first use
        sys.modules["jax"].config.update("jax_platforms", platforms)


def _any_node(patterns: Sequence[str]) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line and name the nearest flag, subcommand or value."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        flags = self._flags()
        # Misspelled flags come first: argparse would rather report what is missing in their place.
        for word in itertools.takewhile(lambda word: word != "--", given):
            name = word.split("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
                self._refuse(word)
        known, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse(unknown[0])
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def _refuse(self, word: str) -> NoReturn:
        near = did_you_mean(word.split("=")[0], self._flags())
        self.error(f"unknown argument {word}.{near}")

    def _flags(self) -> list[str]:
        """Returns the flags of this parser and of its subcommands."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    flags += [flag for each in command._actions for flag in each.option_strings]
        return flags

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        listed = [str(choice) for choice in action.choices]
        raise argparse.ArgumentError(
            action,
            f"invalid choice: {value!r} (choose from {', '.join(listed)})."
            f"{did_you_mean(str(value), listed)}",
        )


def add_config_flags(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds `--config` and `--set`, which every command about a run has."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a file of configs/; arguments follow a colon: configs/hd_finetune.py:size=8b",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help=f"override fields of the config, e.g. {example}",
    )
