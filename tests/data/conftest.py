"""Tokenizers that several tests read; none of them changes the files."""

import json
import shutil

import pytest

from internvlx_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def standin(golden, tmp_path_factory):
    """The stand-in model of golden/labels: InternLM2's traits (BPE, byte fallback, no dummy prefix) in 620 pieces."""
    folder = tmp_path_factory.mktemp("standin")
    shutil.copy(golden / "labels" / "standin_internlm2.model", folder / "tokenizer.model")
    vocab = json.loads((golden / "labels" / "vocab.json").read_text())["internlm2"]
    (folder / "added_tokens.json").write_text(json.dumps(vocab["added"]))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def real(shared_data):
    """The real InternLM2 tokenizer, which is third-party data."""
    return Tokenizer.load(shared_data / "internlm2_tokenizer")
