"""A new model from a ViT folder and an LLM folder (checkpoints.md 8)."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from internvlx_jax import load
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.cli.convert import main
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.bpe_build import AddedToken, byte_level_bpe
from internvlx_jax.data.new_tokens import IMAGE_TOKENS

ROWS = 200


@pytest.fixture
def parts(tmp_path, make_checkpoint):
    """parts(family): folders of tower and decoder; -> the tensors they came from."""

    def make(family="qwen2", projector="pvtc"):
        tensors = make_checkpoint(tmp_path / "whole", family, projector)
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        for name, prefix, section in (
            ("vit", "vision_model.", "vision_config"),
            ("llm", "language_model.", "llm_config"),
        ):
            (tmp_path / name).mkdir()
            own = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            save_file(own, tmp_path / name / "model.safetensors")
            (tmp_path / name / "config.json").write_text(json.dumps(config[section]))
        letters = sorted(ByteLevel.alphabet())[: ROWS - 2]
        added = [AddedToken(token, ROWS - 2 + n) for n, token in enumerate(("<s>", "</s>"))]
        fast = byte_level_bpe(
            {x: n for n, x in enumerate(letters)}, [], added, pretokenizer="gpt-2"
        )
        (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(fast))
        (tmp_path / "llm" / "tokenizer_config.json").write_text("{}")
        return tensors

    return make


def build(tmp_path, *flags):
    return main(
        [
            "import",
            "--vit",
            str(tmp_path / "vit"),
            "--llm",
            str(tmp_path / "llm"),
            "--to",
            str(tmp_path / "jax"),
            *map(str, flags),
        ]
    )


def test_new_projector_and_tokens(tmp_path, parts, capsys):
    tensors = parts()
    assert build(tmp_path, "--verify") == 0
    out = capsys.readouterr().out
    assert "9 new tokens, ids 200..208; 9 rows added to 200" in out
    assert "initialized projector.cls_scale: [4, 64] ~ " in out
    run = RunFolder(tmp_path / "jax")
    embedding, head = run.read("decoder.embedding"), run.read("decoder.head")
    old = tensors["language_model.lm_head.weight"]
    assert embedding.shape == (ROWS + 9, 64) and head.shape == (64, ROWS + 9)
    np.testing.assert_array_equal(
        embedding[:ROWS], tensors["language_model.model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(head[:, :ROWS], old.T)
    np.testing.assert_allclose(head[:, ROWS:], np.tile(old.mean(axis=0)[:, None], 9), atol=1e-6)
    assert 0.015 < embedding[ROWS:].std() < 0.025
    np.testing.assert_array_equal(
        run.read("vision.patch_embed.bias"), tensors["vision_model.embeddings.patch_embedding.bias"]
    )
    assert run.config.decoder.vocab_size == ROWS + 9 and run.config.prompt.template == "internvl2_5"
    source = tmp_path / "jax" / "source"
    assert json.loads((source / "added_tokens.json").read_text()) == {
        t: ROWS + n for n, t in enumerate(IMAGE_TOKENS)
    }
    fast = json.loads((source / "tokenizer.json").read_text())
    assert [entry["id"] for entry in fast["added_tokens"]] == list(range(ROWS - 2, ROWS + 9))
    # The folder that comes out is a whole checkpoint.
    assert (
        main(
            [
                "export",
                "--from",
                str(tmp_path / "jax"),
                "--to",
                str(tmp_path / "out"),
                "--layout",
                "internvl-x",
                "--dtype",
                "keep",
            ]
        )
        == 0
    )
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_given_projector_mean_rows_and_seed(tmp_path, parts, capsys):
    tensors = parts()
    bare = {
        name.removeprefix("projector."): array
        for name, array in tensors.items()
        if name.startswith("projector.")
    }
    save_file(bare, tmp_path / "mine.safetensors")
    assert build(tmp_path, "--projector", tmp_path / "mine.safetensors", "--mean_input_rows") == 0
    assert "initialized" not in capsys.readouterr().out
    run = RunFolder(tmp_path / "jax")
    np.testing.assert_array_equal(
        run.read("projector.cls_scale").reshape(bare["cls_scale"].shape), bare["cls_scale"]
    )
    embedding = run.read("decoder.embedding")
    np.testing.assert_allclose(
        embedding[ROWS:], np.tile(embedding[:ROWS].mean(axis=0), (9, 1)), atol=1e-6
    )


def test_mlp1_projectors(tmp_path, parts):
    tensors = parts("internlm2", "mlp1")
    assert build(tmp_path, "--projector_kind", "mlp1") == 0
    assert RunFolder(tmp_path / "jax").config.projector.kind == "mlp1"
    given = {name: array for name, array in tensors.items() if name.startswith("mlp1.")}
    (tmp_path / "projector").mkdir()
    save_file(given, tmp_path / "projector" / "model.safetensors")
    (tmp_path / "jax").rename(tmp_path / "first")
    assert build(tmp_path, "--projector", tmp_path / "projector") == 0
    assert (
        main(
            [
                "export",
                "--from",
                str(tmp_path / "jax"),
                "--to",
                str(tmp_path / "out"),
                "--layout",
                "internvl",
                "--dtype",
                "keep",
            ]
        )
        == 0
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(stored[name], array) for name, array in given.items())


def test_another_image_size(tmp_path, parts, capsys):
    tensors = parts()
    assert build(tmp_path, "--image_size", "112") == 0
    run = RunFolder(tmp_path / "jax")
    assert run.config.vision.image_size == run.config.prompt.tiles.tile_size == 112
    positions = run.read("vision.position_embedding")
    stored = tensors["vision_model.embeddings.position_embedding"][0]
    assert positions.shape == (65, 64)
    np.testing.assert_array_equal(positions[0], stored[0])
    np.testing.assert_allclose(positions[1:].mean(), stored[1:].mean(), atol=2e-3)


def test_what_is_refused(tmp_path, parts, capsys):
    parts()
    (tmp_path / "llm" / "tokenizer.json").unlink()
    assert build(tmp_path) == 1
    assert "no tokenizer.model, tokenizer.json or vocab.json" in capsys.readouterr().err
    (tmp_path / "llm" / "vocab.json").write_text(json.dumps({"a": ROWS - 2}))
    (tmp_path / "llm" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "llm" / "added_tokens.json").write_text(json.dumps({"</s>": ROWS - 1}))
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS - 1}))
    assert build(tmp_path) == 1
    assert "has 200 ids, but config.json says vocab_size 199" in capsys.readouterr().err
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS + 3}))
    assert build(tmp_path) == 1
    assert "has 200 rows, config.json says vocab_size 203" in capsys.readouterr().err
    (tmp_path / "llm" / "config.json").write_text(
        json.dumps(config | {"architectures": ["MambaForCausalLM"]})
    )
    assert build(tmp_path) == 1
    assert "describes 'MambaForCausalLM'" in capsys.readouterr().err
    assert not (tmp_path / "jax").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text, "the tokenizer has 588 ids, model.decoder.vocab_size is 200"),
        (lambda text: text[:1000], "tokenizer.json"),
        (lambda text: text.replace("<img>", "<im>"), 'no added token "<img>"'),
    ],
)
def test_import_says_what_keeps_a_tokenizer_from_use(
    change, message, tmp_path, make_checkpoint, golden, capsys
):
    """The weights are imported all the same; what needs text then refuses in the same words."""
    make_checkpoint(tmp_path / "source", "qwen2", "mlp1")
    for file in (golden / "bpe" / "tokenizer").iterdir():
        text = file.read_text(encoding="utf-8")
        changed = change(text) if file.name == "tokenizer.json" else text
        (tmp_path / "source" / file.name).write_text(changed, encoding="utf-8")
    source, out = str(tmp_path / "source"), str(tmp_path / "jax")
    assert main(["import", "--from", source, "--to", out]) == 0
    note = capsys.readouterr().out
    assert "the tokenizer files cannot be used as they are: " in note and message in note
    with pytest.raises(ConfigError, match=message):
        load(out)
