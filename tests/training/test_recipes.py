"""The files of configs/: the table of training.md 1, recorded fields, and set-up on a mesh."""

import itertools
import json
from pathlib import Path

import jax
import pytest

from internvlx_jax.core.overrides import load_config_file, to_dict
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.setup import prepare

CONFIGS = Path(__file__).parents[2] / "configs"
RECORDED = json.loads((CONFIGS.parent / "tests" / "golden" / "recipes.json").read_text())
V, P, L = "vision", "projector", "decoder"


@pytest.mark.parametrize(
    "recipe, trained, lr, warmup, batch, length, tiles, drop_path, rule",
    [
        ("finetune", (P, L), 4e-5, 0.03, 128, 4096, 1, 0.1, "all"),
        ("hd_finetune", (P, L), 4e-5, 0.03, 128, 4096, 6, 0.1, "all"),
        ("pretrain", (P,), 2e-4, 100, 512, 4096, 1, 0.0, "standard"),
        ("sft", (V, P, L), 4e-5, 0.03, 512, 4096, 1, 0.1, "standard"),
        ("hd_sft", (V, P, L), 4e-5, 0.03, 512, 8192, 6, 0.1, "standard"),
        ("internvl15_pretrain", (V, P), 2e-5, 100, 2048, 4096, 12, 0.1, "all"),
        ("internvl15_finetune", (V, P, L), 4e-5, 0.03, 1024, 8192, 12, 0.1, "all"),
        ("internvl2_finetune", (P, L), 4e-5, 0.03, 128, 4096, 6, 0.1, "all"),
    ],
)
def test_the_table(recipe, trained, lr, warmup, batch, length, tiles, drop_path, rule):
    config = load_config_file(CONFIGS / f"{recipe}.py")
    freeze, optimizer, cut = config.freeze, config.optimizer, config.model.prompt.tiles
    assert (freeze.vit, freeze.projector, freeze.llm) == (
        V not in trained,
        P not in trained,
        L not in trained,
    )
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.decay_rule) == (
        lr,
        0.01,
        rule,
    )
    assert (
        warmup == (optimizer.warmup_steps or optimizer.warmup_ratio)
        and optimizer.schedule == "cosine"
    )
    assert (config.data.samples_per_step, config.data.max_length, config.data.batch_mode) == (
        batch,
        length,
        "samples",
    )
    assert (
        tiles == (cut.max_num if cut.dynamic else 1) and config.model.vision.drop_path == drop_path
    )
    second = recipe in ("finetune", "hd_finetune", "internvl2_finetune")
    assert (freeze.vit_mode == "train") == second


@pytest.mark.parametrize("recipe, rule", [("internvl2_lora", "off"), ("hd_lora", "edge")])
def test_the_lora_row_of_the_table(recipe, rule):
    config = load_config_file(CONFIGS / f"{recipe}.py")
    assert config.freeze.train_lora_only and config.data.samples_per_step == 16
    assert [(lora.part, lora.rank, lora.scale, lora.dropout) for lora in config.lora] == [
        ("decoder", 16, 2.0, 0.05)
    ]
    assert (config.model.prompt.tiles.rule, config.model.prompt.tiles.max_num) == (rule, 6)
    assert (config.model.vision.drop_path, config.optimizer.learning_rate) == (0.0, 4e-5)


@pytest.mark.parametrize(
    "recipe, trained, lr, warmup, drop_path, steps",
    [
        ("internvl25_stage1", (P,), 2e-4, 100, 0.0, 100_000),
        ("internvl25_stage1_5", (V, P), 1e-5, 100, 0.1, None),
        ("internvl25_stage2", (V, P, L), 4e-5, 0.03, 0.1, 5500),
    ],
)
def test_the_packed_rows_of_the_table(recipe, trained, lr, warmup, drop_path, steps):
    config = load_config_file(f"{CONFIGS / recipe}.py:size=8b")
    assert (config.freeze.vit, config.freeze.llm) == (V not in trained, L not in trained)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (lr, 0.05)
    assert warmup == (config.optimizer.warmup_steps or config.optimizer.warmup_ratio)
    data = config.data
    assert (data.batch_mode, data.max_length, data.pack.tiles, data.loss_reduction) == (
        "pack",
        16384,
        48,
        "square",
    )
    assert data.tokens_per_step == 512 * data.max_length
    assert (config.model.vision.drop_path, config.steps) == (drop_path, steps)


@pytest.mark.parametrize("source", RECORDED)
def test_every_field_is_the_recorded_one(source):
    """Recorded when recipes were functions of a model; only names of folders have changed since.

    The first entry of the record is complete, the others list what differs from it.
    """
    added = {  # fields that came later, with what they were before
        "model.decoder.qk_norm": False,
        "local_checkpoint_dir": None,
        "data.index_workers": None,
        "data.cache.folder": None,
        "data.cache.max_gb": 0.0,
        "data.cache.requests": 32,
    }
    expected = next(iter(RECORDED.values())) | RECORDED[source] | added
    fields = flat(to_dict(load_config_file(CONFIGS / source)))
    renamed = {"output_dir"}
    if not (expected["init_from"] or "").startswith("checkpoints/"):
        renamed.add("init_from")  # the run folder of the stage before, which has a new name too
    expected = {path: value for path, value in expected.items() if value != "(absent)"}
    differing = {
        path
        for path in expected.keys() | fields.keys()
        if expected.get(path, "absent") != fields.get(path, "absent")
    }
    assert differing <= renamed


def flat(value, path=""):
    """Nested fields by dotted path."""
    if not isinstance(value, dict):
        return {path: value}
    parts = [flat(inner, f"{path}.{name}" if path else name) for name, inner in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


LARGE = [
    path.stem
    for path in CONFIGS.glob("*.py")
    if not path.stem.startswith(("demo", "receipts", "ablation", "x_"))
]
WITH_LVTC = ("finetune", "hd_finetune", "pretrain", "vit_projector", "sft", "hd_sft")
SOURCES = [
    *(path.name for path in sorted(CONFIGS.glob("*.py")) if path.stem not in LARGE),
    *(f"{name}.py:size={size}" for name in sorted(LARGE) for size in ("2b", "8b")),
    *(
        f"hd_finetune.py:size={size},lvtc={lvtc}"
        for size, lvtc in itertools.product(("2b", "8b"), ("paper", "fast"))
    ),
    *(f"{name}.py:lvtc=paper" for name in WITH_LVTC),
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_config_file_can_be_set_up(source):
    """Shapes, freezing, groups and shardings of the state, without arrays."""
    config = load_config_file(CONFIGS / source)
    setup = prepare(config, config.model, make_mesh(config.mesh), steps=1000)
    trained, frozen = setup.state.trainable, setup.state.frozen
    assert {path.split(".")[0] for path in trained} == trained_modules(
        source.partition(".")[0], config.model.lvtc
    )
    assert trained.keys() | frozen.keys() == setup.abstract.shapes.keys()
    assert all(leaf.dtype == config.compute.dtype for leaf in frozen.values())
    assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(setup.state))


def trained_modules(name, lvtc):
    if name.endswith("lora"):
        return {L}
    modules = {
        "pretrain": {P},
        "x_warmup": {P},
        "internvl25_stage1": {P},
        "vit_projector": {V, P},
        "internvl15_pretrain": {V, P},
        "internvl25_stage1_5": {V, P},
        "ablation_pages": {P, L},
        "ablation_easyvqa": {P, L},
        "finetune": {P, L},
        "hd_finetune": {P, L},
        "internvl2_finetune": {P, L},
    }.get(name, {V, P, L})
    return modules | ({"lvtc"} if lvtc else set())


def test_the_stages_follow_each_other():
    """Each stage starts from the run folder of the one before, with the same size and LVTC."""
    for arguments in ("size=2b,lvtc=off", "size=8b,lvtc=paper"):
        stages = {
            name: load_config_file(f"{CONFIGS / name}.py:{arguments}")
            for name in ("pretrain", "vit_projector", "sft", "hd_sft")
        }
        assert stages["vit_projector"].init_from == stages["pretrain"].output_dir
        assert stages["sft"].init_from == stages["vit_projector"].output_dir
        assert stages["hd_sft"].init_from == stages["vit_projector"].output_dir
