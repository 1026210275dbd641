"""Qwen3 against transformers: one model in both layouts (model.md 9, checkpoints.md 5)."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.name_table import NESTED, name_table
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.cli.convert import main
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.models.decoder import Decoder, TokenLayout
from internvlx_jax.models.generation import greedy
from internvlx_jax.models.loss import token_losses, weighted_loss
from internvlx_jax.models.params import flatten

ATOL = 1e-4
IMAGE_TOKEN = 7
HF_FIELDS = (
    "--field",
    "template=internvl2_5",
    "dynamic_image_size=true",
    "use_thumbnail=true",
    "max_dynamic_patch=12",
)


def convert(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """The golden folder, its import, the export in transformers' layout, and that one's import."""
    root = tmp_path_factory.mktemp("qwen3")
    made = {"internvl": golden / "qwen3" / "internvl"}
    made |= {name: root / name for name in ("jax", "hf", "hf_jax")}
    assert convert("import", "--from", made["internvl"], "--to", made["jax"], "--verify") == 0
    export = ("--layout", "hf", "--image_token_id", IMAGE_TOKEN, "--dtype", "keep", "--verify")
    assert convert("export", "--from", made["jax"], "--to", made["hf"], *export) == 0
    # As transformers wrote it: its own config.json, without a field of ours.
    shutil.copyfile(golden / "qwen3" / "hf" / "config.json", made["hf"] / "config.json")
    assert convert("import", "--from", made["hf"], "--to", made["hf_jax"], *HF_FIELDS) == 0
    return made


@pytest.fixture(scope="module", params=["internvl", "hf_jax"])
def model(request, folders):
    return load_pretrained(folders[request.param], dtype="float32").model


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden / "qwen3" / "inputs.npz")), dict(
        np.load(golden / "qwen3" / "outputs.npz")
    )


def whole_batch(model, inputs):
    tiles = inputs["pixel_values"][inputs["image_flags"] == 1]
    return inputs_from_flat(
        model.config, IMAGE_TOKEN, inputs["input_ids"], tiles, inputs["attention_mask"]
    )


def loss_of(model, batch, labels):
    ce, _ = token_losses(model.decoder, model(batch), labels)
    total, weight = weighted_loss(ce, (labels != -100).astype(jnp.float32))
    return total / weight


def test_the_hf_layout_is_that_of_transformers(golden, folders):
    """Name, shape, dtype and bytes of every tensor of the file that transformers wrote."""
    written = json.loads((golden / "qwen3" / "hf" / "tensors.json").read_text())
    ours = load_file(folders["hf"] / "model.safetensors")
    assert ours.keys() == written.keys()
    for name, array in ours.items():
        found = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        assert found == written[name], name


def test_both_layouts_are_one_model(golden, folders, tmp_path):
    first, second = RunFolder(folders["jax"]), RunFolder(folders["hf_jax"])
    assert first.config == second.config and first.config.decoder.qk_norm
    assert first.config.decoder.head_dim * first.config.decoder.heads != first.config.decoder.width
    for path, array in first.read_all(first.shapes):
        np.testing.assert_array_equal(array, second.read(path), err_msg=path)
    back = tmp_path / "back"
    options = ("--layout", "internvl", "--dtype", "keep")
    assert convert("export", "--from", folders["hf_jax"], "--to", back, *options) == 0
    stored, again = (
        load_file(folder / "model.safetensors") for folder in (golden / "qwen3" / "internvl", back)
    )
    assert stored.keys() == again.keys()
    assert all(stored[name].tobytes() == again[name].tobytes() for name in stored)


def test_tower_projector_and_decoder(model, arrays):
    inputs, outputs = arrays
    tokens = inputs["llm_input_ids"]

    @jax.jit
    def logits(decoder, tokens, layout):
        x = decoder.embed(tokens, jnp.float32)
        return decoder.logits(Decoder.run_layers(decoder, x, layout)[0])

    for name, mask, positions in (
        ("llm_logits", np.ones_like(tokens), np.arange(12)[None].repeat(2, 0)),
        ("llm_logits_mask_left_pos", inputs["llm_mask_left"], inputs["llm_position_ids_left"]),
    ):
        layout = TokenLayout(jnp.asarray(positions, jnp.int32), jnp.asarray(mask, jnp.int32))
        ours = np.asarray(logits(model.decoder, jnp.asarray(tokens), layout))
        np.testing.assert_allclose(ours[mask == 1], outputs[name][mask == 1], atol=ATOL, rtol=0)


def test_logits_loss_and_gradients(model, arrays, golden):
    """Logits and loss at 1e-4; the norm of every gradient within 1e-4 of its size."""
    inputs, outputs = arrays
    batch, labels = whole_batch(model, inputs), jnp.asarray(inputs["labels"], jnp.int32)
    mask = inputs["attention_mask"] == 1
    ours = np.asarray(jax.jit(lambda m, b: m.decoder.logits(m(b)))(model, batch))
    np.testing.assert_allclose(ours[mask], outputs["logits"][mask], atol=ATOL, rtol=0)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(model, batch, labels)
    np.testing.assert_allclose(loss, outputs["loss"], atol=ATOL, rtol=0)
    flat = flatten(nnx.to_pure_dict(nnx.state(grads)))
    norms = json.loads((golden / "qwen3" / "grad_norms_hf.json").read_text())
    flat_names = {
        next((NESTED[p] + n.removeprefix(p) for p in NESTED if n.startswith(p)), n): n
        for n in norms
    }
    compared = set()
    for entry in name_table(model.config, "hf"):
        for layer in range(entry.layers or 1):
            gradient = np.asarray(
                flat[entry.target] if entry.layers is None else flat[entry.target][layer]
            )
            for name, piece in zip(entry.sources(layer), entry.to_sources(gradient)):
                # A key bias adds the same to all scores of a query: its gradient is 0, and what
                # either side computes is noise of 1e-11.
                np.testing.assert_allclose(
                    np.linalg.norm(piece),
                    norms[flat_names[name]],
                    rtol=1e-4,
                    atol=1e-9,
                    err_msg=name,
                )
                compared.add(flat_names[name])
    assert compared == norms.keys()


def test_greedy_tokens(model, arrays):
    inputs, outputs = arrays
    pixels = inputs["pixel_values"]
    run = jax.jit(lambda m, b: greedy(m, b, max_new_tokens=8, stop_ids=(), pad_id=2))
    for name, tiles in (("gen1", pixels[:2]), ("gen2", pixels[:3]), ("gen_text", pixels[:0])):
        ids = inputs[f"{name}_input_ids"]
        mask = inputs.get(f"{name}_attention_mask", np.ones_like(ids))
        positions = np.where(mask == 1, mask.cumsum(axis=1) - 1, 1)
        batch = inputs_from_flat(model.config, IMAGE_TOKEN, ids, tiles, mask, positions)
        np.testing.assert_array_equal(
            run(model, batch)[0], outputs[f"{name}_new_tokens"], err_msg=name
        )


def test_a_tied_qwen3(golden, folders, tmp_path):
    """Without lm_head and with the flag: tied, and the exports say so in both layouts."""
    tied = tmp_path / "tied"
    tied.mkdir()
    tensors = load_file(folders["internvl"] / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folders["internvl"] / "config.json").read_text())
    fields["llm_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(fields))
    assert convert("import", "--from", tied, "--to", tmp_path / "jax") == 0
    assert RunFolder(tmp_path / "jax").config.decoder.tie_embeddings
    for layout, part in (("internvl", "llm_config"), ("hf", "text_config")):
        out = tmp_path / layout
        options = ("--layout", layout, "--dtype", "keep", "--image_token_id", IMAGE_TOKEN)
        assert convert("export", "--from", tmp_path / "jax", "--to", out, *options) == 0
        assert "language_model.lm_head.weight" not in load_file(out / "model.safetensors")
        written = json.loads((out / "config.json").read_text())
        assert written[part]["tie_word_embeddings"] and written["tie_word_embeddings"]
        assert convert("import", "--from", out, "--to", tmp_path / f"{layout}_jax") == 0
        again = RunFolder(tmp_path / f"{layout}_jax")
        assert again.config == RunFolder(tmp_path / "jax").config


def test_an_untied_checkpoint_whose_flag_says_tied(folders, tmp_path):
    """The stored head decides, and the exported config no longer contradicts it."""
    source = tmp_path / "source"
    shutil.copytree(folders["internvl"], source)
    (source / "config.json").chmod(0o644)
    fields = json.loads((source / "config.json").read_text())
    fields["tie_word_embeddings"] = fields["llm_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(fields))
    assert convert("import", "--from", source, "--to", tmp_path / "jax") == 0
    assert not RunFolder(tmp_path / "jax").config.decoder.tie_embeddings
    out = tmp_path / "hf"
    options = ("--layout", "hf", "--image_token_id", IMAGE_TOKEN)
    assert convert("export", "--from", tmp_path / "jax", "--to", out, *options) == 0
    written = json.loads((out / "config.json").read_text())
    assert not written["text_config"]["tie_word_embeddings"]
    assert not written["tie_word_embeddings"]
