"""Byte-level BPE against transformers: prompts of random conversations, and an export of a run.

`make test-torch` runs these in an environment of their own (requirements-torch.txt), where they
may not be skipped.
"""

import os
import random

import jax
import numpy as np
import pytest

if os.environ.get("REQUIRE_TORCH") != "1":
    pytest.importorskip("torch", reason="needs torch and transformers: make test-torch")

import torch
from bpe_session import QUESTION, run_session
from PIL import Image
from test_hf_processor import CHATML
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from internvlx_jax import load_pretrained
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.data.encode import encode_prompt, encode_sample
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.data.tiles import cut_tiles, normalize
from internvlx_jax.data.tokenizer import Tokenizer

CONVERSATIONS = 200
TOKENS_PER_TILE = 4
WORDS = [
    "图片里有什么？",
    "总额是多少",
    "カメラ",
    "합계",
    "😀",
    "👩‍👩‍👧",
    "🇫🇷",
    "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "a\r\nb\r\n",
    "\r",
    "\n\n",
    "\n",
    "  ",
    " ",
    "\t",
    "The total is",
    "12.50",
    "1234567890",
    "it's WE'LL don't",
    "e\u0301",
    "é",
    "\u1e9b\u0323",
    "<ref>the cat</ref>",
    "<box>[[1, 2, 3, 4]]</box>",
    "end|>",
    "< |im_end|>",
    "\u2028",
    "\ufeff",
    "\x00",
    "naïve",
]


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_slow"])
def both(request, golden):
    """(ours, transformers') of one form of the files."""
    folder = golden / "bpe" / request.param
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def random_turns(draw: random.Random) -> tuple[str | None, list[tuple[str, str]], list[int]]:
    """Returns a system message or none, turns of both sides, and the images of each question."""

    def text(least):
        return "".join(draw.choices(WORDS, k=draw.randint(least, 8)))

    turns, images = [], []
    for _ in range(draw.randint(1, 4)):
        images.append(draw.choice((0, 0, 1, 1, 2, 3)))
        turns += [("human", "<image>\n" * images[-1] + text(1)), ("gpt", text(1))]
    return draw.choice((None, None, text(1))), turns, images


def as_messages(system, turns, images):
    """The conversation as transformers takes it: images are parts in front of the text."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    counts = iter(images)
    for role, text in turns:
        if role == "human":
            count = next(counts)
            parts = [{"type": "image"}] * count
            parts.append({"type": "text", "text": text.removeprefix("<image>\n" * count)})
            messages.append({"role": "user", "content": parts})
        else:
            messages.append({"role": "assistant", "content": text})
    return messages


def with_tiles(text, mark, tiles):
    """Puts the tokens of each image's tiles where its mark stands, as InternVLProcessor does."""
    first, *rest = text.split(mark)
    assert len(rest) == len(tiles)
    return first + "".join(
        f"<img>{'<IMG_CONTEXT>' * TOKENS_PER_TILE * count}</img>{part}"
        for count, part in zip(tiles, rest, strict=True)
    )


@pytest.mark.parametrize("name", ["internvl_hf", "internvl2_5"])
def test_random_conversations(both, name):
    ours, theirs = both
    template, draw = get_template(name), random.Random(0)
    kinds = set()
    for _ in range(CONVERSATIONS):
        system, turns, images = random_turns(draw)
        tiles = [draw.randint(1, 3) for _ in range(sum(images))]
        arguments = dict(
            system=system,
            template=template,
            tokenizer=ours,
            tiles_per_image=tiles,
            tokens_per_tile=TOKENS_PER_TILE,
        )
        last = images[-1]
        asked = turns[:-1]
        pairs = [(turns[n][1], turns[n + 1][1]) for n in range(0, len(turns) - 2, 2)]
        found = [
            encode_sample(turns, **arguments).tokens.tolist(),
            encode_prompt(asked[-1][1], history=pairs, **arguments).tokens.tolist(),
        ]
        for tokens, shown, generate in zip(found, (turns, asked), (False, True), strict=True):
            if name == "internvl_hf":
                text, mark = (
                    theirs.apply_chat_template(
                        as_messages(system, shown, images),
                        chat_template=CHATML,
                        tokenize=False,
                        add_generation_prompt=generate,
                    ),
                    "<IMG_CONTEXT>",
                )
            else:
                ask = [("gpt", "")] if generate else []
                text, mark = prompt_text(template, [*shown, *ask], system=system), "<image>"
            expected = theirs(with_tiles(text, mark, tiles), add_special_tokens=True).input_ids
            assert tokens == expected
            assert ours.decode(tokens, skip_special=False) == theirs.decode(
                tokens, clean_up_tokenization_spaces=False
            )
        kinds.add((system is None, len(pairs), last))
    assert len(kinds) > 20


def test_an_export_of_a_bpe_run_loads_in_transformers(tmp_path, make_checkpoint, golden):
    session = run_session(tmp_path, make_checkpoint, golden)
    model, info = InternVLForConditionalGeneration.from_pretrained(
        session.hf, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, theirs = Tokenizer.load(session.hf), AutoTokenizer.from_pretrained(session.hf)
    loaded = load_pretrained(session.run, dtype="float32")
    prompt = loaded.config.prompt
    tiles = cut_tiles(Image.open(session.page).convert("RGB"), prompt.tiles)
    question = f"<image>\n{QUESTION}"
    tokens = encode_prompt(
        question,
        system=prompt.system_message,
        template=get_template(prompt.template),
        tokenizer=ours,
        tiles_per_image=[len(tiles)],
        tokens_per_tile=TOKENS_PER_TILE,
    ).tokens
    text = prompt_text(get_template(prompt.template), [("human", question), ("gpt", "")], system="")
    assert theirs(with_tiles(text, "<image>", [len(tiles)])).input_ids == tokens.tolist()

    pixels = normalize(tiles).transpose(0, 3, 1, 2)
    ids = torch.tensor(tokens[None].astype(np.int64))
    values = torch.tensor(pixels)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, pixel_values=values).logits.numpy()
        written = model.generate(
            input_ids=ids,
            pixel_values=values,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=ours.token_id("<|im_end|>"),
            pad_token_id=ours.pad_id,
        )[0]
    inputs = inputs_from_flat(loaded.config, ours.image_token_id, tokens[None], pixels)
    with jax.default_matmul_precision("highest"):
        found = loaded.model.decoder.logits(loaded.model(inputs))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4, rtol=0)
    new = written[len(tokens) :]
    answer = theirs.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert answer.strip() == session.answer
