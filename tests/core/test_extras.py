"""A missing optional package is named together with the extra that installs it."""

import sys

import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.extras import require


def test_an_installed_module_is_returned():
    assert require("json.decoder", extra="eval", purpose="this") is sys.modules["json.decoder"]


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ConfigError) as error:
        require("pyarrow.parquet", extra="eval", purpose="reading parquet files")
    assert str(error.value) == (
        "reading parquet files needs pyarrow, which is not installed; "
        "pip install 'internvlx-jax[eval]'"
    )


def test_a_missing_dependency_of_an_installed_package_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import surely_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_missing"):
        require("half_installed", extra="eval", purpose="this")
