"""What starts without a model starts without jax, and a missing extra is named."""

import subprocess
import sys

import pytest
from mini_data import ROOT

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet, tables

HEAVY = ("jax", "flax", "orbax", "pyarrow", "openpyxl")


@pytest.mark.parametrize(
    "command",
    [
        "runpy.run_path('eval.py', run_name='__main__')",
        "from internvlx_jax.cli import main; sys.exit(main(['eval', *sys.argv[1:]]))",
    ],
    ids=["eval.py", "internvlx eval"],
)
@pytest.mark.parametrize("flag", ["--list", "--help"])
def test_listing_and_help_load_neither_jax_nor_orbax(command, flag):
    code = (
        "import atexit, runpy, sys\n"
        f"loaded = lambda: [name for name in {HEAVY} if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded', loaded()))\n"
        f"{command}\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, flag], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert "textvqa_val" in process.stdout or "--checkpoint" in process.stdout
    assert process.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize("package", ["pyarrow", "openpyxl"])
def test_a_missing_package_names_its_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}.*'internvlx-jax\[eval\]'"):
        if package == "pyarrow":
            next(parquet.rows(tmp_path / "x.parquet"))
        else:
            tables.write_table(tmp_path / "table", [{"a": "b"}])
    assert not list(tmp_path.iterdir())
