"""LoRA: in place and as folders of peft; merged, or kept and exported again (checkpoints.md 9)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.hf_folder import HFFolder, open_tensors
from internvlx_jax.checkpoints.lora_files import write_adapters
from internvlx_jax.checkpoints.peft_folder import read_peft_folder
from internvlx_jax.cli.convert import main
from internvlx_jax.convert.import_hf import adapter_entries
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.models.params import flatten

RANK = 2
TARGETS = {
    "internlm2": (
        "attention.wqkv",
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ),
    "qwen2": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
TOWER = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def adapters(tensors, prefix, targets, seed=1):
    """{module: (A, B)} for the targets under a prefix, random."""
    rng = np.random.default_rng(seed)
    modules = sorted(
        name.removesuffix(".weight")
        for name in tensors
        if name.startswith(prefix) and name.removesuffix(".weight").endswith(targets)
    )
    assert modules
    return {
        module: (
            rng.normal(0, 0.1, (RANK, tensors[f"{module}.weight"].shape[1])).astype(np.float32),
            rng.normal(0, 0.1, (tensors[f"{module}.weight"].shape[0], RANK)).astype(np.float32),
        )
        for module in modules
    }


def merged(tensors, found, scale):
    """The definition, in PyTorch's axes: W + s * B A."""
    return tensors | {
        f"{module}.weight": tensors[f"{module}.weight"] + scale * (b @ a)
        for module, (a, b) in found.items()
    }


def write_peft(folder, found, prefix, **config):
    folder.mkdir()
    tensors = {}
    for module, (a, b) in found.items():
        name = "base_model.model." + module.removeprefix(prefix)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "bias": "none",
        "fan_in_fan_out": False,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def same(folder, expected, atol):
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=atol, rtol=0, err_msg=name)


def export(source, to, layout="internvl-x"):
    assert (
        run(
            "export",
            "--from",
            source,
            "--to",
            to,
            "--layout",
            layout,
            "--dtype",
            "keep",
            "--verify",
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", TARGETS)
def test_adapter_folders(tmp_path, make_checkpoint, family):
    """Adapters are merged at import, at export and when loaded, and written as they came."""
    tensors = make_checkpoint(tmp_path / "base", family)
    tower, decoder = (
        adapters(tensors, "vision_model.", TOWER),
        adapters(tensors, "language_model.", TARGETS[family]),
    )
    write_peft(tmp_path / "lora_vit", tower, "vision_model.")
    write_peft(tmp_path / "lora_llm", decoder, "language_model.", use_rslora=True)
    expected = merged(merged(tensors, tower, 6 / RANK), decoder, 6 / RANK**0.5)
    flags = ("--lora", tmp_path / "lora_vit", tmp_path / "lora_llm")

    assert (
        run("import", "--from", tmp_path / "base", "--to", tmp_path / "jax", "--verify", *flags)
        == 0
    )
    export(tmp_path / "jax", tmp_path / "merged")
    same(tmp_path / "merged", expected, 1e-6)

    assert (
        run(
            "import",
            "--from",
            tmp_path / "base",
            "--to",
            tmp_path / "kept",
            "--keep_lora",
            "--verify",
            *flags,
        )
        == 0
    )
    export(tmp_path / "kept", tmp_path / "merged_late")
    same(tmp_path / "merged_late", expected, 1e-6)
    export(tmp_path / "kept", tmp_path / "adapters", "peft")
    for part, source in (("vision_model", "lora_vit"), ("language_model", "lora_llm")):
        one = load_file(tmp_path / source / "adapter_model.safetensors")
        other = load_file(tmp_path / "adapters" / part / "adapter_model.safetensors")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
        config = json.loads((tmp_path / "adapters" / part / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, 6, 0.1)
        assert config["target_modules"] == sorted(
            TOWER if part == "vision_model" else TARGETS[family]
        )
        assert config["use_rslora"] == (part == "language_model")
    one, other = (
        flatten(
            nnx.to_pure_dict(nnx.state(load_pretrained(tmp_path / name, dtype="float32").model))
        )
        for name in ("jax", "kept")
    )
    for path in one:
        np.testing.assert_allclose(one[path], other[path], atol=1e-6, rtol=0)


def in_place(folder, tensors, found, part, config):
    """The checkpoint that training with LoRA leaves behind."""
    stored = {}
    for name, array in tensors.items():
        prefix = f"{part}."
        if not name.startswith(prefix):
            stored[name] = array
            continue
        module, _, end = name.rpartition(".")
        if module in found:
            module += ".base_layer"
        stored[
            f"{prefix}base_model.model.{module.removeprefix(prefix)}.{end}"
            if module != name
            else name
        ] = array
    for module, (a, b) in found.items():
        name = f"{part}.base_model.model.{module.removeprefix(part + '.')}"
        stored |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
    save_file(stored, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))


def test_in_place(tmp_path, make_checkpoint, capsys):
    tensors = make_checkpoint(tmp_path / "model", "internlm2")
    found = adapters(tensors, "language_model.", TARGETS["internlm2"])
    in_place(tmp_path / "model", tensors, found, "language_model", {"use_llm_lora": RANK})
    assert run("inspect", tmp_path / "model") == 0
    assert "LoRA in place (decoder rank 2)" in capsys.readouterr().out
    assert run("import", "--from", tmp_path / "model", "--to", tmp_path / "jax", "--verify") == 0
    export(tmp_path / "jax", tmp_path / "back")
    same(tmp_path / "back", merged(tensors, found, 2.0), 1e-6)  # alpha is twice the rank
    assert json.loads((tmp_path / "back" / "config.json").read_text())["use_llm_lora"] == 0
    in_place(tmp_path / "model", tensors, found, "language_model", {"use_llm_lora": 0})
    assert run("import", "--from", tmp_path / "model", "--to", tmp_path / "again") == 1
    assert "use_llm_lora is 0, but the checkpoint holds 20 LoRA tensors" in capsys.readouterr().err


def test_adapters_from_arrays(tmp_path, make_checkpoint):
    """`write_adapters` takes what training has in memory, and names it as one layout does."""
    tensors = make_checkpoint(tmp_path / "base", "internlm2", "mlp1")
    found = adapters(tensors, "language_model.", TARGETS["internlm2"])
    write_peft(tmp_path / "lora", found, "language_model.")
    source = HFFolder(tmp_path / "base", adapters=[tmp_path / "lora"], keep_lora=True)
    (lora,) = source.kept
    params = {
        entry.target: jnp.stack([lora.read(entry, layer) for layer in range(entry.layers)])
        for entry in adapter_entries(lora)
    }
    write_adapters(
        tmp_path / "out", params | {"decoder.norm.weight": jnp.ones(64)}, source.config, lora.config
    )
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out")
    )
    assert one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )
    assert (
        read_peft_folder(
            tmp_path / "out",
            source.table,
            source.layout,
            open_tensors(tmp_path / "out", "adapter_model"),
            source.tensors,
        )
        .loras[0]
        .config
        == lora.config
    )
    for change, message in (
        (
            {"decoder.layers.mlp.up.lora_a": params["decoder.layers.mlp.up.lora_a"][..., :1]},
            "rank 1",
        ),
        ({"decoder.layers.mlp.other.lora_a": jnp.ones((2, 64, 2))}, "mlp.other.lora_a"),
        ({path: value for path, value in params.items() if "lora_a" in path}, "lora_a and lora_b"),
    ):
        changed = change if len(change) > 1 else params | change
        with pytest.raises(ConfigError, match=message):
            write_adapters(tmp_path / "wrong", changed, source.config, lora.config)
    with pytest.raises(ConfigError, match="no LoRA parameters of the decoder part"):
        write_adapters(tmp_path / "wrong", {}, source.config, lora.config)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"wqkv": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 4}, "has rank 2, the config says r = 4"),
        ({"r": 0}, "adapter_config.json: r is 0, it must be a number above 0"),
        ({"lora_alpha": 0}, "adapter_config.json: lora_alpha is 0, it must be"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha is nan"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected a flag"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
        ({"alpha_pattern": {"wqkv": "a"}}, "alpha_pattern gives 'wqkv' 'a', expected a number"),
        ({"rank_pattern": {"wqkv": 1.5}}, "rank_pattern gives 'wqkv' 1.5, expected a number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has '(', which is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], expected an object"),
        ({"init_lora_weights": "pissa_niter_4"}, "begins with other base weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]] is not supported"),
    ],
)
def test_what_is_refused(tmp_path, make_checkpoint, capsys, config, message):
    tensors = make_checkpoint(tmp_path / "base", "internlm2")
    write_peft(
        tmp_path / "lora",
        adapters(tensors, "language_model.", TARGETS["internlm2"]),
        "language_model.",
        **config,
    )
    assert (
        run(
            "import",
            "--from",
            tmp_path / "base",
            "--to",
            tmp_path / "jax",
            "--lora",
            tmp_path / "lora",
        )
        == 1
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jax").exists()


def test_adapters_that_do_not_fit(tmp_path, make_checkpoint, capsys):
    tensors = make_checkpoint(tmp_path / "base", "internlm2")
    found = adapters(tensors, "language_model.", TARGETS["internlm2"])
    odd = {module.replace("wqkv", "wxyz"): pair for module, pair in found.items()}
    write_peft(tmp_path / "lora", odd, "language_model.")
    assert (
        run(
            "import",
            "--from",
            tmp_path / "base",
            "--to",
            tmp_path / "jax",
            "--lora",
            tmp_path / "lora",
        )
        == 1
    )
    message = capsys.readouterr().err
    assert (
        "layers.0.attention.wxyz.lora_A.weight belongs to no linear map of this model's decoder "
        "part" in message
    )
    assert run("import", "--from", tmp_path / "base", "--to", tmp_path / "jax", "--keep_lora") == 1
    assert "holds no adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "targets, layers",
    [
        (("self_attn.q_proj", "self_attn.v_proj"), (0, 1)),  # peft's default for Qwen2 and Llama
        (("self_attn.q_proj",), (0, 1)),
        (TARGETS["qwen2"], (1,)),  # layers_to_transform
        (("mlp.up_proj",), (0,)),
    ],
)
def test_some_projections_or_layers_only(tmp_path, make_checkpoint, targets, layers, capsys):
    """The maps without an adapter keep their weights bit for bit, and the report counts them."""
    tensors = make_checkpoint(tmp_path / "base", "qwen2")
    found = {
        module: pair
        for module, pair in adapters(tensors, "language_model.", targets).items()
        if any(f".layers.{layer}." in module for layer in layers)
    }
    write_peft(tmp_path / "lora", found, "language_model.", layers_to_transform=list(layers))
    flags = ("--from", tmp_path / "base", "--lora", tmp_path / "lora", "--verify")
    expected = merged(tensors, found, 6 / RANK)
    for name, more in (("jax", ()), ("kept", ("--keep_lora",))):
        assert run("import", "--to", tmp_path / name, *flags, *more) == 0
        assert f"{len(found)} of 14 linear maps" in capsys.readouterr().out
        export(tmp_path / name, tmp_path / f"{name}_back")
        same(tmp_path / f"{name}_back", expected, 1e-6)
        written = load_file(tmp_path / f"{name}_back" / "model.safetensors")
        for tensor, array in tensors.items():
            if tensor.removesuffix(".weight") not in found and ".q" not in tensor:
                np.testing.assert_array_equal(written[tensor], array, err_msg=tensor)


@pytest.mark.parametrize("spelling", ["released", "nested"])
def test_adapters_of_the_whole_model(tmp_path, make_checkpoint, spelling):
    """Names below the whole InternVL, both parts in one folder, in either spelling."""
    tensors = make_checkpoint(tmp_path / "base", "qwen2", "mlp1")
    found = adapters(tensors, "vision_model.", TOWER) if spelling == "released" else {}
    found |= adapters(tensors, "language_model.", TARGETS["qwen2"], seed=2)
    base = tmp_path / "base"
    if spelling == "released":
        write_peft(tmp_path / "lora", found, "")
    else:
        base = tmp_path / "hf"
        run(
            *("export", "--from", tmp_path / "base", "--to", base, "--layout", "hf"),
            *("--image_token_id", 7, "--dtype", "keep"),
        )
        nested = {
            module.replace("language_model.model.", "model.language_model."): pair
            for module, pair in found.items()
        }
        write_peft(tmp_path / "lora", nested, "")
    flags = ("--from", base, "--to", tmp_path / "jax", "--lora", tmp_path / "lora", "--verify")
    assert run("import", *flags) == 0
    export(tmp_path / "jax", tmp_path / "back", "internvl")
    same(tmp_path / "back", merged(tensors, found, 6 / RANK), 1e-6)


def test_ranks_and_scales_of_their_own(tmp_path, make_checkpoint, capsys):
    """rank_pattern and alpha_pattern are merged as peft would, and refused beside the weights."""
    tensors = make_checkpoint(tmp_path / "base", "qwen2")
    found = adapters(tensors, "language_model.", TARGETS["qwen2"])
    rng = np.random.default_rng(3)
    larger = {
        module: tuple(
            rng.normal(0, 0.1, tuple(5 if n == RANK else n for n in side.shape)).astype(np.float32)
            for side in pair
        )
        for module, pair in found.items()
        if module.endswith("up_proj")
    }
    patterns = {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"layers.0.mlp.down_proj": 1}}
    write_peft(tmp_path / "lora", found | larger, "language_model.", **patterns)
    flags = ("--from", tmp_path / "base", "--to", tmp_path / "jax", "--lora", tmp_path / "lora")
    assert run("import", *flags, "--keep_lora") == 1
    assert "rank_pattern or alpha_pattern gives modules ranks" in capsys.readouterr().err
    assert run("import", *flags, "--verify") == 0
    export(tmp_path / "jax", tmp_path / "back")
    expected = merged(tensors, found, 6 / RANK)
    for module, (a, b) in larger.items():
        expected[f"{module}.weight"] = tensors[f"{module}.weight"] + 6 / 5 * (b @ a)
    down = "language_model.model.layers.0.mlp.down_proj"
    a, b = found[down]
    expected[f"{down}.weight"] = tensors[f"{down}.weight"] + 1 / RANK * (b @ a)
    same(tmp_path / "back", expected, 1e-6)


def test_modules_that_were_trained_whole(tmp_path, make_checkpoint, capsys):
    """modules_to_save replaces the base weights; one of another shape is refused."""
    tensors = make_checkpoint(tmp_path / "base", "qwen2")
    found = adapters(tensors, "language_model.", ("self_attn.q_proj",))
    write_peft(tmp_path / "lora", found, "language_model.", modules_to_save=["lm_head"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    head = tensors["language_model.lm_head.weight"]
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head + 1}, file)
    flags = ("--from", tmp_path / "base", "--to", tmp_path / "jax", "--lora", tmp_path / "lora")
    assert run("import", *flags, "--verify") == 0
    assert "trained whole and taken from there: language_model.lm_head.weight" in (
        capsys.readouterr().out
    )
    export(tmp_path / "jax", tmp_path / "back")
    expected = merged(tensors, found, 6 / RANK) | {"language_model.lm_head.weight": head + 1}
    same(tmp_path / "back", expected, 1e-6)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head[:-1]}, file)
    flags = ("--from", tmp_path / "base", "--to", tmp_path / "no", "--lora", tmp_path / "lora")
    assert run("import", *flags) == 1
    assert "base_model.model.lm_head.weight has shape [199, 64]" in capsys.readouterr().err


def test_half_a_pair(tmp_path, make_checkpoint, capsys):
    tensors = make_checkpoint(tmp_path / "base", "qwen2")
    write_peft(
        tmp_path / "lora", adapters(tensors, "language_model.", ("v_proj",)), "language_model."
    )
    file = tmp_path / "lora" / "adapter_model.safetensors"
    stored = load_file(file)
    lost = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file({name: array for name, array in stored.items() if name != lost}, file)
    flags = ("--from", tmp_path / "base", "--to", tmp_path / "jax", "--lora", tmp_path / "lora")
    assert run("import", *flags) == 1
    assert "layers.1.self_attn.v_proj.lora_B.weight is missing, but" in capsys.readouterr().err
    assert not (tmp_path / "jax").exists()
