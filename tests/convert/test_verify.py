"""`convert verify`: the table, the exit status, and models outside the golden folders."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.torch_checkpoint import expected_tensors
from internvlx_jax.cli.convert import main
from internvlx_jax.models.params import abstract_model

OUTPUTS = {
    "vit_last_hidden_state",
    "extract_feature",
    "proj_out_v2",
    "llm_logits",
    "llm_logits_mask_left_pos",
    "logits",
    "loss",
    "gen1_new_tokens",
    "gen2_new_tokens",
    "gen_text_new_tokens",
}


def verify(folder, inputs, out, *more):
    return main(
        [
            "verify",
            "--checkpoint",
            str(folder),
            "--inputs",
            str(inputs),
            "--out",
            str(out),
            "--image_token_id",
            "7",
            *map(str, more),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internlm2", "internlm2_qknorm", "qwen2"])
def test_golden(golden, name, tmp_path, capsys):
    folder, out = golden / name, tmp_path / "out.npz"
    assert verify(folder, folder / "inputs.npz", out, "--reference", folder / "outputs.npz") == 0
    assert set(np.load(out).files) == OUTPUTS
    table = capsys.readouterr().out
    assert all(name in table for name in OUTPUTS) and "FAIL" not in table


def test_a_changed_weight_fails(golden, tmp_path, capsys):
    shutil.copytree(golden / "internlm2", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["projector.attn_local.mlp.w2.weight"][0, 0] += 0.5
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    status = verify(
        tmp_path / "model",
        golden / "internlm2" / "inputs.npz",
        tmp_path / "out.npz",
        "--reference",
        golden / "internlm2" / "outputs.npz",
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert status == 1
    assert (
        "FAIL" in lines["proj_out_v2"]
        and "FAIL" in lines["logits"]
        and "FAIL" not in lines["llm_logits"]
    )


def llama_with_mlp1(golden, folder):
    """A Llama decoder with biases and linear RoPE scaling, mlp1 before it, random weights."""
    config = json.loads((golden / "internlm2" / "config.json").read_text())
    config["llm_config"] |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "eos_token_id": [3, 5],
    }
    parsed = model_config(config, ["mlp1.0.weight", "language_model.lm_head.weight"])
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in expected_tensors(
            name_table(parsed), abstract_model(parsed, dtype="float32")
        ).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_another_family_and_projector(golden, tmp_path):
    tensors = llama_with_mlp1(golden, tmp_path / "model")
    assert (
        "language_model.model.layers.0.self_attn.o_proj.bias" in tensors
        and "mlp1.3.bias" in tensors
    )
    assert (
        verify(tmp_path / "model", golden / "internlm2" / "inputs.npz", tmp_path / "out.npz") == 0
    )
    outputs = np.load(tmp_path / "out.npz")
    assert set(outputs.files) == OUTPUTS
    assert all(np.isfinite(outputs[name]).all() for name in outputs.files)
    # A second run agrees with the first.
    assert (
        verify(
            tmp_path / "model",
            golden / "internlm2" / "inputs.npz",
            tmp_path / "again.npz",
            "--reference",
            tmp_path / "out.npz",
            "--atol",
            "0",
        )
        == 0
    )


def test_only_what_the_inputs_allow(golden, tmp_path):
    inputs = dict(np.load(golden / "internlm2" / "inputs.npz"))
    np.savez(tmp_path / "few.npz", llm_input_ids=inputs["llm_input_ids"])
    assert verify(golden / "internlm2", tmp_path / "few.npz", tmp_path / "out.npz") == 0
    assert np.load(tmp_path / "out.npz").files == ["llm_logits"]


@pytest.mark.parametrize(
    "argument, message",
    [
        (("--image_token_id", "8"), "placeholders"),
        (("--inputs", "missing.npz"), "missing.npz"),
        (("--checkpoint", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(golden, tmp_path, capsys, argument, message):
    folder, out = golden / "internlm2", tmp_path / "out.npz"
    assert verify(folder, folder / "inputs.npz", out, *argument) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
