"""Recipes are the rows of training.md 1, and every file of configs/ means something on a mesh."""

from pathlib import Path

import jax
import pytest

from internvlx_jax.core import recipes
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.setup import prepare

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
V, P, L = "vision", "projector", "decoder"


@pytest.mark.parametrize("recipe, trained, lr, warmup, batch, length, tiles, drop_path, rule", [
    ("x_2nd_finetune", (P, L), 4e-5, 0.03, 128, 4096, 1, 0.1, "all"),
    ("x_hd_2nd_finetune", (P, L), 4e-5, 0.03, 128, 4096, 6, 0.1, "all"),
    ("x_pretrain", (P,), 2e-4, 100, 512, 4096, 1, 0.0, "standard"),
    ("x_sft", (V, P, L), 4e-5, 0.03, 512, 4096, 1, 0.1, "standard"),
    ("x_hd_sft", (V, P, L), 4e-5, 0.03, 512, 8192, 6, 0.1, "standard"),
    ("ivl15_pretrain", (V, P), 2e-5, 100, 2048, 4096, 12, 0.1, "all"),
    ("ivl15_finetune", (V, P, L), 4e-5, 0.03, 1024, 8192, 12, 0.1, "all"),
    ("ivl2_2nd_full", (P, L), 4e-5, 0.03, 128, 4096, 6, 0.1, "all"),
])  # fmt: skip
def test_the_table(recipe, trained, lr, warmup, batch, length, tiles, drop_path, rule):
    config = getattr(recipes, recipe)(internvlx_2b(), name="x", init_from="y")
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
    assert (freeze.vit_mode == "train") == ("2nd" in recipe)


@pytest.mark.parametrize("recipe, rule", [("ivl2_2nd_lora", "off"), ("x_hd_2nd_lora", "edge")])
def test_the_lora_row_of_the_table(recipe, rule):
    config = getattr(recipes, recipe)(internvlx_2b(), name="x", init_from="y")
    assert config.freeze.train_lora_only and config.data.samples_per_step == 16
    assert [(lora.part, lora.rank, lora.scale, lora.dropout) for lora in config.lora] == [
        ("decoder", 16, 2.0, 0.05)
    ]
    assert (config.model.prompt.tiles.rule, config.model.prompt.tiles.max_num) == (rule, 6)
    assert (config.model.vision.drop_path, config.optimizer.learning_rate) == (0.0, 4e-5)


@pytest.mark.parametrize(
    "recipe, trained, lr, warmup, drop_path, steps",
    [
        ("ivl25_stage1", (P,), 2e-4, 100, 0.0, 100_000),
        ("ivl25_stage1_5", (V, P), 1e-5, 100, 0.1, None),
        ("ivl25_stage2", (V, P, L), 4e-5, 0.03, 0.1, 5500),
    ],
)
def test_the_packed_rows_of_the_table(recipe, trained, lr, warmup, drop_path, steps):
    also = {
        "ivl25_stage1": dict(weight_decay=0.05),
        "ivl25_stage2": dict(weight_decay=0.05, steps=5500),
    }
    config = getattr(recipes, recipe)(
        internvlx_2b(), name="x", init_from="y", **also.get(recipe, {})
    )
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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_file_can_be_set_up(file):
    """Shapes, freezing, groups and shardings of the state, without arrays."""
    config = load_config_file(file)
    setup = prepare(config, config.model, make_mesh(config.mesh), steps=1000)
    trained, frozen = setup.state.trainable, setup.state.frozen
    assert {path.split(".")[0] for path in trained} == trained_modules(file.stem)
    assert trained.keys() | frozen.keys() == setup.abstract.shapes.keys()
    assert all(leaf.dtype == config.compute.dtype for leaf in frozen.values())
    assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(setup.state))
    if file.stem.startswith("internvlx"):
        assert config.output_dir == f"runs/{file.stem}"


def trained_modules(name):
    lvtc = {"lvtc"} if name.endswith(("paper", "fast")) else set()
    if name.endswith("pretrain"):
        return {P} | lvtc
    if name.endswith("lora"):
        return {L}
    if name.endswith("vit_projector"):
        return {V, P}
    second = name.startswith("internvlx") and not name.endswith("sft")
    return {P, L} | lvtc if second else {V, P, L} | lvtc
