"""GGUF files that cannot be used: one error with file, field and remedy (checkpoints.md 12)."""

import gguf
import numpy as np
import pytest

from internvlx_jax.checkpoints.gguf_file import GgufFile, in_halves
from internvlx_jax.cli.convert import main
from internvlx_jax.core.errors import CheckpointError, ConfigError


def write(
    path,
    architecture="llama",
    tensors=("token_embd", "blk.0.attn_q"),
    dtype=np.float32,
    **fields,
):
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": 1,
        "embedding_length": 8,
        "feed_forward_length": 16,
        "attention.head_count": 2,
        "context_length": 32,
    }
    for name, value in (sizes | fields).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(
            f"{architecture}.{name}", value
        )
    for n, name in enumerate(tensors):
        writer.add_tensor(f"{name}.weight", np.arange(64, dtype=dtype).reshape(8, 8) + dtype(n))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rows_of_llama_are_put_back_into_halves(tmp_path):
    """Pairs 0, H/2, 1, H/2 + 1 become 0, 1, ..., H/2, ...; other families keep their order."""
    file = GgufFile(write(tmp_path / "m.gguf"))
    stored = np.arange(64, dtype=np.float32).reshape(8, 8) + 1
    found = file.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(found, stored[[0, 2, 1, 3, 4, 6, 5, 7]])
    np.testing.assert_array_equal(found, in_halves(stored, 2))
    qwen = GgufFile(write(tmp_path / "q.gguf", "qwen3"))
    np.testing.assert_array_equal(qwen.read("model.layers.0.self_attn.q_proj.weight"), stored)
    assert file.config["tie_word_embeddings"] and file.config["vocab_size"] == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "gemma"}, "general.architecture is 'gemma'; read are llama, qwen2"),
        ({"expert_count": 8}, "llama.expert_count is 8: routed experts"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"block_count": "1"}, "llama.block_count is '1', expected a whole number"),
        ({"tensors": ("token_embd", "rope_freqs")}, "tensor rope_freqs.weight has no place"),
        ({"tensors": ("output",)}, "tensor token_embd.weight is missing"),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises((ConfigError, CheckpointError), match="m.gguf") as caught:
        GgufFile(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 40, 400, -1])
def test_a_truncated_file(tmp_path, length, capsys):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:length])
    flags = ("--vit", "fresh-tiny", "--llm", str(path), "--to", str(tmp_path / "jax"))
    assert main(["import", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "m.gguf" in error and "etch" in error
    assert "Traceback" not in error and not (tmp_path / "jax").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"architecture": "gemma"},
            "general.architecture is 'gemma'; read are llama, qwen2, qwen3",
        ),
        ({"dtype": np.int8}, "quantization I8 of token_embd.weight and 1 more cannot be turned"),
    ],
)
def test_an_import_writes_nothing(tmp_path, options, message, capsys):
    """The command's one message has file, field and remedy, and no folder is left."""
    path = write(tmp_path / "m.gguf", **options)
    flags = ("--vit", "fresh-tiny", "--llm", str(path), "--to", str(tmp_path / "jax"))
    assert main(["import", *flags]) == 1
    error = capsys.readouterr().err
    assert "m.gguf" in error and message in error and "se a" in error and "Traceback" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_quantization_that_is_not_known(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")

    def refuse(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(CheckpointError, match=r"quantization F32 of token_embd.weight and 1 more"):
        GgufFile(path)
