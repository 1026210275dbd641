"""Every numeric field of every config has a range, and refuses what lies outside it by name.

The fields are found by a walk over the config classes, so that a new field without a range fails.
"""

import dataclasses
import math
import types
import typing

import pytest

from internvlx_jax.cli.train import main
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LoraConfig,
    LvtcConfig,
    ModelConfig,
    VisionConfig,
)
from internvlx_jax.core.run_config import GroupConfig, TrainConfig
from internvlx_jax.data.synthetic import SyntheticConfig
from internvlx_jax.evaluation.job_config import Decoding, EvalConfig

MODEL = ModelConfig(
    vision=VisionConfig(width=8, layers=1, heads=2, mlp_width=8),
    decoder=DecoderConfig(
        vocab_size=8, width=8, layers=2, heads=2, kv_heads=2, head_dim=4, mlp_width=8
    ),
    lvtc=LvtcConfig(expand_layer=0, low_grid=16, high_grid=32, inject_layers=(1,)),
)
ASKED = EvaluationConfig(tasks="pope")
VALID = {
    TrainConfig: TrainConfig(
        output_dir="x",
        model=MODEL,
        data=DataConfig(meta="m"),
        lora=(LoraConfig(part="decoder", rank=2, alpha=4.0),),
    ),
    EvalConfig: EvalConfig(checkpoint="x", out_dir="y", selection=ASKED),
    EvaluationConfig: ASKED,
    GroupConfig: GroupConfig(params="a"),
    LoraConfig: LoraConfig(part="decoder", rank=2, alpha=4.0),
    SyntheticConfig: SyntheticConfig(),
    Sampling: Sampling(),
    Decoding: Decoding(),
}


def kinds(hint) -> set[type]:
    """Returns the types that a hint is made of, None and tuples opened."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return set().union(*(kinds(arg) for arg in typing.get_args(hint)))
    return {hint} if isinstance(hint, type) else set()


def numeric_fields():
    """Yields (a valid config that has the field, its name, its type), nested ones included."""
    waiting, seen = list(VALID.values()), set()
    while waiting:
        config = waiting.pop()
        if type(config) in seen:
            continue
        seen.add(type(config))
        for name, hint in typing.get_type_hints(type(config)).items():
            found = kinds(hint)
            value = getattr(config, name)
            waiting += [each for each in (value,) if dataclasses.is_dataclass(each)]
            if numeric := found & {int, float}:
                yield config, name, numeric.pop(), tuple in kinds_with_tuples(hint)


def kinds_with_tuples(hint) -> set:
    return {typing.get_origin(hint)}


FIELDS = sorted(numeric_fields(), key=lambda field: (type(field[0]).__name__, field[1]))
BAD = {
    int: (-(10**6) - 1, 2**70),
    float: (math.nan, math.inf, -math.inf),
}
ANY_SIGN = {"select_layer", "layer_scale_init", "gate"}  # every finite number means something


@pytest.mark.parametrize(
    "config, name, kind, many",
    FIELDS,
    ids=[f"{type(config).__name__}.{name}" for config, name, *_ in FIELDS],
)
def test_every_number_has_a_range(config, name, kind, many):
    negative = () if name in ANY_SIGN else (-7,) if kind is int else (-0.5, -7.0)
    for value in (*BAD[kind], *negative):
        with pytest.raises(
            ConfigError, match=rf"{name}\b.*( it must be|must be above 0| is outside )"
        ):
            dataclasses.replace(config, **{name: (value,) if many else value})


def test_the_walk_finds_the_fields():
    found = {f"{type(config).__name__}.{name}" for config, name, *_ in FIELDS}
    assert {"TrainConfig.steps", "OptimizerConfig.b2", "MeshConfig.fsdp", "Sampling.top_p"} < found
    assert {"TileConfig.max_num", "RopeConfig.long_factor", "VideoConfig.max_frames"} < found
    assert len(found) > 90


@pytest.mark.parametrize(
    "setting, message",
    [
        ("steps=0", "steps is 0, it must be at least 1"),
        ("steps=-5", "steps is -5, it must be at least 1"),
        ("epochs=0", "epochs is 0, it must be at least 1"),
        ("seed=-1", "seed is -1, it must be from 0 to 4294967295"),
        ("compute.accumulation=0", "compute.accumulation is 0, it must be at least 1"),
        ("data.num_workers=-2", "data.num_workers is -2, it must be from 0 to 1024"),
        ("optimizer.b2=1.5", "optimizer.b2 is 1.5, it must be from 0 to below 1"),
        ("optimizer.b1=1e999", "optimizer.b1 is inf, it must be a finite number"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1, it must be at least 0"),
        ("mesh.fsdp=0", "mesh.fsdp is 0, it must be at least 1, or -1"),
        ("model.decoder.kv_heads=0", "decoder.kv_heads is 0, it must be at least 1"),
        ("model.prompt.tiles.max_num=5000", "tiles.max_num is 5000, it must be from 1 to 4096"),
        ("freeze.unfreeze_vit_last=-1", "freeze.unfreeze_vit_last is -1, it must be at least 0"),
    ],
)
def test_a_run_with_a_number_out_of_range_is_refused(setting, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--config", "configs/demo.py", "--set", f"output_dir={out}", setting]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not out.exists()


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_stop_after_is_a_count(steps, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "configs/demo.py", "--stop_after", steps])
    assert stopped.value.code == 2
    assert "--stop_after" in capsys.readouterr().err
