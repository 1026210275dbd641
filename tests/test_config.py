"""Run configs: files, overrides, JSON and back."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import from_dict, load_config_file, override, to_dict
from internvlx_jax.core.run_config import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    heads: int = 2
    ratio: float = 0.5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    mode: Literal["none", "full"] = "full"
    path: str | None = None
    steps: int | None = 5
    flag: bool = False
    sizes: tuple[int, ...] = ()
    words: tuple[str, ...] = ("a",)


OUTER = Outer(name="x")


def changed(**fields):
    return dataclasses.replace(OUTER, **fields)


@pytest.fixture(scope="module")
def demo() -> TrainConfig:
    return load_config_file(CONFIGS / "demo.py")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_config_file_loads_and_survives_json(file):
    config = load_config_file(file)
    assert isinstance(config, TrainConfig)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("name=y", changed(name="y")),
        ("name=3", changed(name="3")),
        ("name=none", changed(name="none")),
        ("name=a=b", changed(name="a=b")),
        ("name=", changed(name="")),
        ("inner.width=16", changed(inner=Inner(width=16))),
        ("inner.ratio=1e-4", changed(inner=Inner(ratio=1e-4))),
        ("inner.ratio=2", changed(inner=Inner(ratio=2.0))),
        ("inner={'width': 4}", changed(inner=Inner(width=4))),
        ("maybe={'heads': 4}", changed(maybe=Inner(heads=4))),
        ("maybe.heads=4", changed(maybe=Inner(heads=4))),
        ("mode=none", changed(mode="none")),
        ("path=runs/5", changed(path="runs/5")),
        ("path=5", changed(path="5")),
        ("path=None", changed(path=None)),
        ("steps=none", changed(steps=None)),
        ("steps=7", changed(steps=7)),
        ("flag=true", changed(flag=True)),
        ("flag=False", changed(flag=False)),
        ("sizes=(1, 2)", changed(sizes=(1, 2))),
        ("sizes=[3]", changed(sizes=(3,))),
        ("words=[]", changed(words=())),
        ("words=['b', 'c.*d']", changed(words=("b", "c.*d"))),
    ],
)
def test_override_sets_a_field_of_every_kind(setting, expected):
    result = override(OUTER, [setting])
    assert result == expected
    assert type(result.inner.ratio) is float


def test_later_settings_win_and_the_config_itself_stays():
    assert override(OUTER, ["steps=1", "inner.width=4", "steps=2"]) == changed(
        steps=2, inner=Inner(width=4)
    )
    assert Outer(name="x") == OUTER


def test_fields_that_depend_on_each_other_change_together():
    assert override(OUTER, ["inner.heads=3", "inner.width=9"]).inner == Inner(width=9, heads=3)


def test_a_run_from_scratch_can_be_turned_into_a_fine_tuning(demo):
    tuned = override(demo, ["init_from=runs/base", "model=none"])
    assert (tuned.model, tuned.init_from) == (None, "runs/base")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("stpes=3", "--set stpes: Outer has no field 'stpes'; did you mean steps?"),
        ("inner.widht=3", "--set inner.widht: Inner has no field 'widht'; did you mean width?"),
        ("inner.qqq=3", "--set inner.qqq: Inner has no field 'qqq'; known: width, heads, ratio"),
        ("maybe.width=3", "maybe: width 3 is not divisible by heads 2"),
        ("inner.width.deep=3", "--set inner.width.deep: 'width' is 8, it has no fields"),
        ("steps.x=3", "--set steps.x: 'steps' is 5, it has no fields"),
        ("steps", "--set steps: expected field=value, e.g. optimizer.learning_rate=1e-4"),
        ("steps=many", "--set steps: expected int, got 'many'"),
        ("steps=1.5", "--set steps: expected int, got 1.5"),
        ("inner.width=none", "--set inner.width: expected int, got None"),
        ("inner.width=true", "--set inner.width: expected int, got True"),
        ("inner.ratio=half", "--set inner.ratio: expected float, got 'half'"),
        ("flag=1", "--set flag: expected bool, got 1"),
        ("sizes=3", "--set sizes: expected a list, got 3"),
        ("sizes=[1, 'a']", "--set sizes[1]: expected int, got 'a'"),
        ("mode=ful", "--set mode: 'ful' is not one of 'none', 'full'; did you mean full?"),
        ("inner=5", "--set inner: expected fields of Inner, got 5"),
        ("inner={'widht': 4}", "--set inner.widht: Inner has no such field; did you mean width?"),
        ("inner.heads=3", "inner: width 8 is not divisible by heads 3"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(setting, message):
    with pytest.raises(ConfigError) as error:
        override(OUTER, [setting])
    assert str(error.value) == message


def test_unknown_fields_of_a_real_config_are_named_at_any_depth(demo):
    for setting, hint in [
        ("optimiser.b1=0.8", "did you mean optimizer?"),
        ("model.vision.widht=3", "mean width?"),
        ("model.decoder.rope.thta=1e6", "mean theta?"),
    ]:
        with pytest.raises(ConfigError, match=hint):
            override(demo, [setting])


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"name": "x", "inner": {"widht": 3}},
            "inner.widht: Inner has no such field; did you mean width?",
        ),
        ({"name": "x", "inner": {"width": "3"}}, "inner.width: expected int, got '3'"),
        ({"name": "x", "inner": [1]}, "inner: expected fields of Inner, got [1]"),
        ({"name": "x", "inner": {"heads": 3}}, "inner: width 8 is not divisible by heads 3"),
        ({}, "Outer: Outer.__init__() missing 1 required keyword-only argument: 'name'"),
        (5, "Outer: expected fields of Outer, got 5"),
    ],
)
def test_stored_configs_are_checked(data, message):
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, data)
    assert str(error.value) == message


def test_a_missing_config_file_names_its_neighbors(tmp_path):
    (tmp_path / "receipts.py").write_text("")
    with pytest.raises(ConfigError, match=r"reciepts.py: no such file; did you mean receipts.py\?"):
        load_config_file(tmp_path / "reciepts.py")
    with pytest.raises(ConfigError, match="no such file$"):
        load_config_file(tmp_path / "nowhere" / "demo.py")


def test_a_config_file_without_get_config_is_an_error(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"empty.py: the file defines no get_config\(\)"):
        load_config_file(file)


SIZES = """
from typing import Literal

def get_config(
    size: Literal["2b", "8b"] = "2b", lvtc="off", *, rate: float = 0.5, layers: tuple[int, ...] = ()
):
    return size, lvtc, rate, layers
"""


@pytest.fixture
def sizes(tmp_path) -> Path:
    file = tmp_path / "sizes.py"
    file.write_text(SIZES)
    return file


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("", ("2b", "off", 0.5, ())),
        (":size=8b", ("8b", "off", 0.5, ())),
        (":lvtc=paper,size=8b", ("8b", "paper", 0.5, ())),
        (":rate=1,layers=[21,22],lvtc=3", ("2b", 3, 1.0, (21, 22))),
        (":lvtc=gs://bucket/x.py:y", ("2b", "gs://bucket/x.py:y", 0.5, ())),
    ],
)
def test_arguments_behind_the_file_reach_get_config(sizes, arguments, expected):
    assert load_config_file(f"{sizes}{arguments}") == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("sise=8b", r"get_config\(size: .*'2b', lvtc='off', .*'sise'; did you mean size\?"),
        ("qqq=1", r"has no parameter 'qqq'; known: size, lvtc, rate, layers$"),
        ("size=7b", r"sizes.py: size: '7b' is not one of '2b', '8b'"),
        ("rate=half", r"sizes.py: rate: expected float, got 'half'"),
        ("size", r"expected name=value after the colon, got 'size'"),
    ],
)
def test_a_wrong_argument_behind_the_file_names_what_get_config_takes(sizes, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config_file(f"{sizes}:{arguments}")


def test_arguments_need_parameters_and_parameters_need_arguments(tmp_path):
    file = tmp_path / "fixed.py"
    file.write_text("def get_config():\n    return 1\n")
    with pytest.raises(ConfigError, match=r"get_config\(\) has no parameter 'size'; known: none"):
        load_config_file(f"{file}:size=8b")
    file.write_text("def get_config(size):\n    return size\n")
    with pytest.raises(ConfigError, match=r"missing a required argument: 'size'; add it"):
        load_config_file(file)


def test_a_config_file_loads_neither_jax_nor_the_evaluator():
    code = """
import sys
from internvlx_jax.core.overrides import load_config_file
for path in sys.argv[1:]:
    load_config_file(path)
rooms = sorted({".".join(m.split(".")[:2]) for m in sys.modules if m.startswith("internvlx_jax.")})
assert rooms == ["internvlx_jax.core"], rooms
for name in ("jax", "flax", "orbax", "pyarrow", "grain"):
    assert name not in sys.modules, name
"""
    files = [str(file) for file in sorted(CONFIGS.glob("*.py"))]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
