"""The command `internvlx`: one module per subcommand, loaded when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys

# Subcommand: module with `main(argv)`, and its line of help.
COMMANDS = {
    "train": ("internvlx_jax.cli.train", "train or resume a run"),
    "eval": (
        "internvlx_jax.cli.evaluate",
        "score a checkpoint on benchmarks or on a question file",
    ),
    "chat": ("internvlx_jax.cli.chat", "talk to a checkpoint in the terminal"),
    "serve": ("internvlx_jax.cli.serve", "answer OpenAI's chat completions over HTTP"),
    "convert": (
        "internvlx_jax.cli.convert",
        "import, export, inspect and verify PyTorch checkpoints",
    ),
    "data": ("internvlx_jax.cli.data", "check, show and generate training data"),
    "compile": ("internvlx_jax.cli.compile", "memory, FLOPs and traffic of a run on given devices"),
    "report": ("internvlx_jax.cli.report", "draw the curves of a run, or compare evaluation jobs"),
    "replay": ("internvlx_jax.cli.replay", "run one step of a run again, without its update"),
}


def usage() -> str:
    """Returns the help text of the command."""
    listed = "\n".join(f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: internvlx COMMAND [FLAGS]\n\n"
        f"commands:\n{listed}\n\n`internvlx COMMAND --help` lists the flags of a command."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status: 2 for an unknown one."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from internvlx_jax import __version__

        print(f"internvlx-jax {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
