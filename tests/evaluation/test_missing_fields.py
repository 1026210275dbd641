"""A field that is missing in a file of InternVL's folders is named before a model is loaded.

(design: evaluation.md 5) The columns of TSV files are in `test_published_files`.
"""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.sources import Roots
from internvlx_jax.evaluation.tasks import TASKS

INTERNVL = [name for name, task in TASKS.items() if "internvl" in task.protocols]


@pytest.fixture(scope="module")
def root(data_root, tmp_path_factory):
    """A copy of the data whose files may be changed."""
    return shutil.copytree(data_root, tmp_path_factory.mktemp("fields") / "data")


def read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, value):
    """Writes what `read` returns; a JSON file is a single line."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(value), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in value), encoding="utf-8")


def fields(value):
    """Yields the names of all fields at any depth; ids of MM-Vet, v1_0 and so on, are none."""
    children = value if isinstance(value, list) else []
    if isinstance(value, dict):
        yield from (name for name in value if not name.startswith("v1_"))
        children = value.values()
    for child in children:
        yield from fields(child)


def without(value, name):
    if isinstance(value, dict):
        return {key: without(child, name) for key, child in value.items() if key != name}
    return [without(child, name) for child in value] if isinstance(value, list) else value


def files(task, root):
    """The files of a task, without those that are like another one; tables have no fields."""
    paths = TASKS[task].protocols["internvl"].source.files(Roots(root, root / "tsv"))
    chosen = {}
    for path in paths:
        alike = path.suffix == ".parquet" or path.parent.name == "json"
        chosen.setdefault(path.suffix if alike else path, path)
    return [path for path in chosen.values() if path.suffix in (".json", ".jsonl", ".parquet")]


@pytest.mark.parametrize("task", INTERNVL)
def test_a_missing_field_is_named_before_a_model_is_loaded(task, root):
    config = EvaluationConfig(tasks=task, protocol="internvl", data_root=str(root))
    for path in files(task, root):
        before, refused = path.read_bytes(), []
        value = read(path)
        for name in dict.fromkeys(fields(value)):
            write(path, without(value, name))
            try:
                select(config)
            except ConfigError as error:
                assert name in str(error) and path.name in str(error)
                refused.append(name)
            finally:
                path.write_bytes(before)
        assert refused, f"nothing of {path} is needed"
    select(config)
