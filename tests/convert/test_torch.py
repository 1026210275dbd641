"""Against PyTorch: transformers loads our exports and computes the same; pickle files are read.

`make test-torch` runs these in an environment of their own (requirements-torch.txt), where they
may not be skipped.
"""

import json
import os
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

if os.environ.get("REQUIRE_TORCH") != "1":
    pytest.importorskip("torch", reason="needs torch and transformers: make test-torch")

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InternVLForConditionalGeneration,
    Phi3ForCausalLM,
)

from internvlx_jax import load_pretrained
from internvlx_jax.cli.convert import main
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.models.decoder import Decoder, TokenLayout

ATOL = 1e-4
IMAGE_TOKEN = 7


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def ours(folder, tokens, pixels):
    loaded = load_pretrained(folder, dtype="float32")
    inputs = inputs_from_flat(loaded.config, IMAGE_TOKEN, tokens, pixels)
    with jax.default_matmul_precision("highest"):
        return np.asarray(
            jax.jit(lambda model, inputs: model.decoder.logits(model(inputs)))(loaded.model, inputs)
        )


@pytest.mark.parametrize(
    "family, tied, towers",
    [
        ("llama", False, {}),
        ("qwen2", False, {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}),
        ("qwen2", True, {}),
        ("qwen3", False, {}),
        ("qwen3", True, {}),
        ("internlm2", False, {}),
    ],
)
def test_transformers_loads_the_hf_export(tmp_path, make_checkpoint, golden, family, tied, towers):
    vision = json.loads((golden / "internlm2" / "config.json").read_text())["vision_config"]
    make_checkpoint(tmp_path / "source", family, "mlp1", tied=tied, vision_config=vision | towers)
    run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax")
    run(
        "export",
        "--from",
        tmp_path / "jax",
        "--to",
        tmp_path / "hf",
        "--layout",
        "hf",
        "--dtype",
        "float32",
        "--image_token_id",
        IMAGE_TOKEN,
        "--verify",
    )
    model, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    head, rows = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is rows) == tied

    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, (2, 12))
    tokens[0, 2:6] = tokens[1, 1:9] = IMAGE_TOKEN  # one tile, then two
    pixels = rng.normal(size=(3, 3, 56, 56)).astype(np.float32)
    with torch.no_grad():
        theirs = model.eval()(
            input_ids=torch.tensor(tokens), pixel_values=torch.tensor(pixels)
        ).logits.numpy()
    assert np.abs(theirs).max() > 0.5
    for folder in ("jax", "hf", "source"):
        np.testing.assert_allclose(
            ours(tmp_path / folder, tokens, pixels), theirs, atol=ATOL, rtol=0, err_msg=folder
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_transformers_loads_the_decoder_of_the_internvl_export(
    tmp_path, make_checkpoint, family, tied
):
    """The tower has no code in transformers; `llm_config` and its tensors are a model there."""
    make_checkpoint(tmp_path / "source", family, "mlp1", tied=tied)
    run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax")
    out, llm = tmp_path / "internvl", tmp_path / "llm"
    options = ("--layout", "internvl", "--dtype", "float32", "--verify")
    run("export", "--from", tmp_path / "jax", "--to", out, *options)
    llm.mkdir()
    config = json.loads((out / "config.json").read_text())["llm_config"]
    assert config.get("tie_word_embeddings", False) == tied
    (llm / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    beginning = "language_model."
    decoder = {
        name.removeprefix(beginning): array
        for name, array in tensors.items()
        if name.startswith(beginning)
    }
    assert ("lm_head.weight" in decoder) != tied
    save_file(decoder, llm / "model.safetensors", metadata={"format": "pt"})
    theirs, info = AutoModelForCausalLM.from_pretrained(
        llm, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__ == {"qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(0, 200, (2, 20))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    assert np.abs(expected).max() > 0.5
    for folder in (out, tmp_path / "jax"):
        found = decoder_logits(load_pretrained(folder, dtype="float32").model.decoder, tokens)
        np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0, err_msg=folder.name)


def decoder_logits(decoder, tokens):
    layout = TokenLayout(
        np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens)
    )
    with jax.default_matmul_precision("highest"):
        x = decoder.embed(tokens, np.float32)
        return decoder.logits(jax.jit(Decoder.run_layers)(decoder, x, layout)[0])


@pytest.mark.parametrize(
    "length", [20, 50]
)  # within the original positions, and beyond them and the sliding window
def test_phi3_decoder(tmp_path, make_checkpoint, length):
    tensors = make_checkpoint(tmp_path / "source", "phi3", "mlp1")
    config = json.loads((tmp_path / "source" / "config.json").read_text())["llm_config"]
    llm = tmp_path / "llm"
    llm.mkdir()
    rope = {
        "rope_type": "longrope",
        "rope_theta": config["rope_theta"],
        **config["rope_scaling"],
        "original_max_position_embeddings": 32,
    }
    keep = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "sliding_window",
        "architectures",
        "model_type",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "original_max_position_embeddings",
    )
    fields = {field: config[field] for field in keep}
    rope.pop("type", None)
    (llm / "config.json").write_text(
        json.dumps(
            fields
            | {"rope_theta": config["rope_theta"], "rope_parameters": rope, "rope_scaling": rope}
        )
    )
    save_file(
        {
            name.removeprefix("language_model."): array
            for name, array in tensors.items()
            if name.startswith("language_model.")
        },
        llm / "model.safetensors",
        metadata={"format": "pt"},
    )
    theirs, info = Phi3ForCausalLM.from_pretrained(
        llm,
        config=AutoConfig.from_pretrained(llm),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = np.random.default_rng(0).integers(0, 200, (2, length))
    decoder = load_pretrained(tmp_path / "source", dtype="float32").model.decoder
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    np.testing.assert_allclose(decoder_logits(decoder, tokens), expected, atol=ATOL, rtol=0)


def test_pickle_files(tmp_path, make_checkpoint, same_tensors):
    """Shards with an index, bfloat16 and float32 mixed: the same checkpoint as from safetensors."""
    source = tmp_path / "source"
    make_checkpoint(source, "qwen2", "pvtc", "bfloat16")
    run("import", "--from", source, "--to", tmp_path / "jax")
    run(
        "export",
        "--from",
        tmp_path / "jax",
        "--to",
        tmp_path / "one",
        "--layout",
        "internvl-x",
        "--dtype",
        "keep",
    )
    tensors = {
        name: torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
        for name, array in load_file(source / "model.safetensors").items()
    }
    (source / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save(
            {name: value for name, value in tensors.items() if weight_map[name] == file},
            source / file,
            _use_new_zipfile_serialization=file.endswith("0.bin"),
        )  # the other as torch wrote before 1.6
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    run("import", "--from", source, "--to", tmp_path / "jax2", "--verify")
    run(
        "export",
        "--from",
        tmp_path / "jax2",
        "--to",
        tmp_path / "two",
        "--layout",
        "internvl-x",
        "--dtype",
        "keep",
    )
    same_tensors(tmp_path / "one", tmp_path / "two")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_pickle_is_not_run(tmp_path, make_checkpoint, monkeypatch, capsys):
    make_checkpoint(tmp_path / "source", "qwen2")
    (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Harmful()}))
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--from", "source", "--to", "jax"]) == 1
    assert "pytorch_model.bin: torch cannot read it as plain weights" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]
