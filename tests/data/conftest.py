"""Tokenizers and a processor that several tests read; none of them changes the files."""

import json
import shutil

import pytest

from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def standin(golden, tmp_path_factory):
    """The stand-in model of golden/labels.

    InternLM2's traits (BPE, byte fallback, no dummy prefix) in 620 pieces.
    """
    folder = tmp_path_factory.mktemp("standin")
    shutil.copy(golden / "labels" / "standin_internlm2.model", folder / "tokenizer.model")
    vocab = json.loads((golden / "labels" / "vocab.json").read_text())["internlm2"]
    (folder / "added_tokens.json").write_text(json.dumps(vocab["added"]))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def hermes(golden, tmp_path_factory):
    """A Llama tokenizer: a space before every stretch of plain text, no bos."""
    return llama_standin(
        golden, tmp_path_factory.mktemp("hermes"), "hermes2", {"add_bos_token": False}
    )


@pytest.fixture(scope="session")
def phi3(golden, tmp_path_factory):
    """One of Phi-3: a space before the first stretch only.

    The chat tokens swallow the white space behind them.
    """
    chat = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    return llama_standin(
        golden, tmp_path_factory.mktemp("phi3"), "phi3", {"legacy": False}, rstrip=chat
    )


def llama_standin(golden, folder, name, config, rstrip=()):
    shutil.copy(golden / "labels" / "standin_llama.model", folder / "tokenizer.model")
    added = json.loads((golden / "labels" / "vocab.json").read_text())[name]["added"]
    decoder = {str(id): {"content": text, "rstrip": text in rstrip} for text, id in added.items()}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"added_tokens_decoder": decoder})
    )
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def bpe(golden):
    """A byte-level BPE tokenizer with Qwen2's pre-tokenization, from tokenizer.json."""
    return Tokenizer.load(golden / "bpe" / "tokenizer")


@pytest.fixture(scope="session")
def bpe_older(golden):
    """The tokenizer of `bpe`, read from vocab.json, merges.txt and added_tokens.json."""
    return Tokenizer.load(golden / "bpe" / "tokenizer_slow")


@pytest.fixture(scope="session")
def real(shared_data):
    """The real InternLM2 tokenizer, which is third-party data."""
    return Tokenizer.load(shared_data / "internlm2_tokenizer")


@pytest.fixture(scope="module")
def processor() -> Processor:
    """How a tiny model reads samples: 4 tokens a tile, at most 4 tiles."""
    return Processor(
        Tokenizer.load(TOKENIZER_FOLDER),
        get_template("internlm2-chat"),
        "",
        TileConfig(tile_size=28, max_num=4),
        4,
    )
