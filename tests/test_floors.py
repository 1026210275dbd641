"""The rooms of the package: each imports only what stands below it, and core and data no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "internvlx_jax"
ROOMS = (
    "core",
    "models",
    "data",
    "checkpoints",
    "inference",
    "training",
    "aot",
    "evaluation",
    "convert",
    "cli",
)


def imported_rooms(tree: ast.AST) -> set[str]:
    """Rooms that a module imports, at its top or inside functions.

    The body of `if __name__ == "__main__"` does not count: there a module is a command, which
    stands above all rooms.
    """
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    parts = [name.split(".") for name in found]
    return {words[1] for words in parts if words[0] == "internvlx_jax" and len(words) > 1} & {
        *ROOMS
    }


def modules(room: str) -> list[str]:
    paths = sorted((PACKAGE / room).rglob("*.py"))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if path.name != "__main__.py"
    ]


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    # data stands beside models: it prepares arrays without knowing what computes with them.
    allowed = {*ROOMS[: ROOMS.index(room) + 1]} - ({"models"} if room == "data" else set())
    wrong = {}
    for path in (PACKAGE / room).rglob("*.py"):
        if path.name != "__main__.py":
            above = imported_rooms(ast.parse(path.read_text(encoding="utf-8"))) - allowed
            if above:
                wrong[str(path.relative_to(PACKAGE))] = sorted(above)
    assert not wrong


def test_what_counts_as_an_import():
    """Commands behind `__main__` do not; imports inside functions and of the package do."""
    text = """
import internvlx_jax.data.plan
from internvlx_jax import models, __version__
from internvlx_jax.core.errors import ConfigError
def late():
    from internvlx_jax.aot import hlo
if __name__ == "__main__":
    from internvlx_jax.cli.train import main
"""
    assert imported_rooms(ast.parse(text)) == {"data", "models", "core", "aot"}


def importing(room: str) -> str:
    return "\n".join(f"import {name}" for name in modules(room))


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_core_loads_no_jax():
    assert not {"jax", "flax", "orbax", "grain"} & loaded_after(importing("core"))


def test_data_needs_no_jax():
    """grain loads jax where it finds it; hidden from it, nothing in data is missed."""
    hidden = "import sys\nfor name in ('jax', 'jaxlib', 'flax'): sys.modules[name] = None\n"
    loaded = loaded_after(hidden + importing("data"))
    assert {*modules("data")} <= loaded
    assert not [name for name in loaded if name.startswith(("jax.", "flax."))]


def test_config_files_load_neither_jax_nor_the_evaluator():
    loaded = loaded_after(
        "from pathlib import Path\n"
        "from internvlx_jax.core.overrides import load_config_file\n"
        "for path in Path('configs').glob('*.py'): load_config_file(path)"
    )
    rooms = {name.split(".")[1] for name in loaded if name.startswith("internvlx_jax.")}
    assert rooms == {"core"}
    assert not {"jax", "flax", "grain", "pyarrow"} & loaded


@pytest.mark.parametrize(
    "command",
    [
        "train --help",
        "train --no_such_flag",
        "chat --help",
        "compile --help",
        "replay --help",
        "eval --help",
        "eval --list",
        "--help",
    ],
)
def test_help_and_lists_load_nothing_that_computes(command):
    """Nor what reads data: they answer at once."""
    loaded = loaded_after(
        "import contextlib, os, sys\n"
        "from internvlx_jax.cli import main\n"
        "with open(os.devnull, 'w') as sink, contextlib.suppress(SystemExit):\n"
        "    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):\n"
        f"        main({command.split()!r})"
    )
    heavy = {"jax", "flax", "optax", "orbax", "grain", "tokenizers", "sentencepiece", "pyarrow"}
    assert not heavy & loaded


def test_flags_of_a_job_load_no_jax():
    loaded = loaded_after(
        "import argparse\n"
        "from internvlx_jax.training import distributed\n"
        "distributed.add_flags(argparse.ArgumentParser())"
    )
    assert "jax" not in loaded
