"""Streaming shows whole characters only, whatever bytes a model writes (design: data.md 5)."""

import random
from pathlib import Path

import pytest

from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.inference.batch_generator import UNFINISHED, AnswerReader, settled

BPE_FOLDER = Path(__file__).parents[1] / "golden" / "bpe" / "tokenizer"
TEXTS = ["图片里有什么？", "😀", "é", "👩‍👩‍👧", " a b", "\n", "naïve", "12.50", "𠀀", UNFINISHED]


@pytest.fixture(scope="module", params=[BPE_FOLDER, TOKENIZER_FOLDER], ids=["bpe", "sentencepiece"])
def decoder(request) -> AnswerReader:
    return AnswerReader(Tokenizer.load(request.param), get_template("internvl2_5"))


@pytest.fixture(scope="module")
def byte_ids(decoder) -> list[int]:
    """The id of each byte, found through what ids of multi-byte characters decode to."""
    tokenizer = decoder.tokenizer
    if tokenizer.path.suffix == ".model":
        found = {tokenizer.piece(id): id for id in range(600)}
        return [found[f"<0x{byte:02X}>"] for byte in range(256)]
    # Letters of byte-level vocabularies in the order of the bytes that they stand for.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    found = {tokenizer.piece(id): id for id in range(256)}
    return [found[letters[byte]] for byte in range(256)]


def shown_after_each(decoder, ids) -> list[str]:
    """What a stream has shown after each token."""
    prefixes = (ids[:n] for n in range(1, len(ids) + 1))
    return [settled(decoder.read(prefix)[0].lstrip()) for prefix in prefixes]


def test_random_bytes(decoder, byte_ids):
    """What is shown once stays: a character never appears before its last byte."""
    draw, shown_characters = random.Random(0), 0
    for _ in range(150):
        ids = []
        while len(ids) < 24:
            kind = draw.random()
            if kind < 0.4:  # any byte
                ids.append(byte_ids[draw.randrange(256)])
            elif kind < 0.6:  # a character, perhaps cut
                data = draw.choice(TEXTS).encode()
                ids += [byte_ids[byte] for byte in data[: draw.randint(1, len(data))]]
            elif kind < 0.9:
                ids += decoder.tokenizer.encode(draw.choice(TEXTS))
            else:  # control tokens have no text, and <box> may stand between two bytes
                ids.append(decoder.tokenizer.token_id("<box>"))
        final = decoder.read(ids)[0].lstrip()
        before = ""
        for shown in shown_after_each(decoder, ids):
            assert shown.startswith(before) and final.startswith(shown)
            before = shown
        shown_characters += len(before)
    assert shown_characters > 1000


def test_whole_characters(decoder, byte_ids):
    """Text that is valid is shown without a replacement character at any time."""
    for text in (text for text in TEXTS if text != UNFINISHED):
        ids = [byte_ids[byte] for byte in f"x{text}y".encode()]
        shown = shown_after_each(decoder, ids)
        assert shown[-1] == f"x{text}y"
        assert not any(UNFINISHED in part for part in shown)
        lengths = {len(part) for part in shown}
        assert lengths <= {len(f"x{text}y"[:n].rstrip()) for n in range(len(text) + 3)}
