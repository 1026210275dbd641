"""Ids, labels and image slots against the release (design: data.md 3 to 6).

Golden cases are those of internlm2-chat, Hermes-2 and phi3-chat, each with the kind of tokenizer it
is used with.
"""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.encode import IGNORED, encode_prompt, encode_sample
from internvlx_jax.data.templates import get_template, prompt_text
from internvlx_jax.data.tokenizer import Tokenizer

CHAT = get_template("internlm2-chat")
V2_5 = get_template("internvl2_5")

# Deliberate differences from the release (data.md 6): a last question without an answer is masked
# here. The release supervises it under internlm2-chat and drops the whole sample under the other
# templates.
ENDS_WITH_HUMAN = "ends_with_human"
TOKENIZERS = {"internlm2-chat": "standin", "Hermes-2": "hermes", "phi3-chat": "phi3"}


def encode(tokenizer, turns, tiles=(), n=4, template=CHAT, system=None, **kwargs):
    return encode_sample(
        turns,
        system=system,
        template=template,
        tokenizer=tokenizer,
        tiles_per_image=tiles,
        tokens_per_tile=n,
        **kwargs,
    )


def supervised_runs(encoded) -> list[list[int]]:
    """The ids of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(encoded.labels != IGNORED, prepend=False, append=False))
    return [encoded.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("mode", ["group_by_length", "pad_to_max"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_golden_labels(name, mode, golden, request):
    tokenizer, template = request.getfixturevalue(TOKENIZERS[name]), get_template(name)
    rows = json.loads((golden / "labels" / "labels.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["template"] == name and row["mode"] == mode]
    assert len(rows) == 13
    for row in rows:
        turns = [(turn["from"], turn["value"]) for turn in row["conversation"]]
        turns = turns[turns[0][0] == "gpt" :]  # as chat.py does
        tokens_per_image = [] if row["text_only"] else row["num_image_token_list"]
        n = min(tokens_per_image, default=4)
        arguments = tokenizer, turns, [tokens // n for tokens in tokens_per_image], n, template
        if row["case"] == "empty_answer":
            with pytest.raises(SampleError) as error:
                encode(*arguments)
            assert error.value.reason == "no_supervision"
            assert set(row["labels"]) == {IGNORED}
            continue
        encoded = encode(*arguments)
        assert encoded.tokens.dtype == encoded.labels.dtype == encoded.tile_start.dtype == np.int32
        length = sum(row["attention_mask"])
        assert encoded.tokens.tolist() == row["input_ids"][:length], row["case"]
        assert set(row["input_ids"][length:]) <= {row["pad_token_id"]}
        expected = np.array(row["labels"])
        if row["case"] == ENDS_WITH_HUMAN and name == "internlm2-chat":
            masked = slice(
                np.flatnonzero(encoded.tokens == tokenizer.token_id("<|im_start|>"))[-1], None
            )
            assert (expected[masked] != IGNORED).any(), "the release no longer differs"
            expected[masked] = IGNORED
        elif row["case"] == ENDS_WITH_HUMAN:
            assert (expected == IGNORED).all(), "the release no longer differs"
            answers = [text for role, text in turns if role == "gpt"]
            runs = [tokenizer.decode(run[:-1]) for run in supervised_runs(encoded)]
            assert runs == answers and {run[-1] for run in supervised_runs(encoded)} == {
                tokenizer.token_id(template.stop)
            }
            continue
        assert encoded.labels.tolist() == expected[:length].tolist(), row["case"]
        slots = [start + i for start in encoded.tile_start for i in range(n)]
        assert slots == np.flatnonzero(encoded.tokens == tokenizer.image_token_id).tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_supervised_tokens_of_the_golden_rows_are_the_answers(name, golden, request):
    """Decoded back: each answer and its separator, nothing else."""
    tokenizer, template = request.getfixturevalue(TOKENIZERS[name]), get_template(name)
    rows = json.loads((golden / "labels" / "labels.json").read_text(encoding="utf-8"))
    seen = 0
    for row in rows:
        if (
            row["template"] != name
            or row["mode"] != "group_by_length"
            or row["case"] == "empty_answer"
        ):
            continue
        turns = [(turn["from"], turn["value"]) for turn in row["conversation"]]
        tokens_per_image = [] if row["text_only"] else row["num_image_token_list"]
        n = min(tokens_per_image, default=4)
        encoded = encode(
            tokenizer,
            turns[turns[0][0] == "gpt" :],
            [tokens // n for tokens in tokens_per_image],
            n,
            template,
        )
        answers = [text for role, text in turns[turns[0][0] == "gpt" :] if role == "gpt"]
        if template.strip_values:
            answers = [answer.strip() for answer in answers]
        found = [tokenizer.decode(run, skip_special=False) for run in supervised_runs(encoded)]
        stop = template.stop
        # White space in front of an answer belongs to the header's token, or is swallowed by it.
        assert [text.removesuffix(stop).strip() for text in found] == [
            answer.strip() for answer in answers
        ], row["case"]
        assert all(text.endswith(stop) for text in found)
        seen += len(found)
    assert seen >= 12


@pytest.mark.parametrize("name", TOKENIZERS)
def test_golden_prompts(name, golden, request):
    tokenizer, template = request.getfixturevalue(TOKENIZERS[name]), get_template(name)
    rows = json.loads((golden / "labels" / "chat.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["template"] == name]
    assert len(rows) == 7
    for row in rows:
        tiles = row.get("num_patches_list") or [row["pv"] or 0]
        questions = row.get("questions") or [row["question"]]
        tiles = [[k] for k in tiles] if len(questions) > 1 else [[k for k in tiles if k]]
        for question, tiles_per_image, ids, mask in zip(
            questions, tiles, row["input_ids"], row["attention_mask"], strict=True
        ):
            arguments = dict(
                history=row.get("history", ()),
                template=template,
                tokenizer=tokenizer,
                tokens_per_tile=row["num_image_token"],
            )
            if (
                row["case"] == "history_no_tag"
            ):  # the release drops the image from the prompt: an error here
                with pytest.raises(SampleError, match='1 image but 0 "<image>" in the human turns'):
                    encode_prompt(question, tiles_per_image=tiles_per_image, **arguments)
                tiles_per_image = []
            encoded = encode_prompt(question, tiles_per_image=tiles_per_image, **arguments)
            assert encoded.tokens.tolist() == ids[mask.count(0) :], row["case"]
            assert set(encoded.labels) == {IGNORED}
            assert len(encoded.tile_start) == sum(tiles_per_image)


def test_example_of_the_specification(real):
    turns = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A cat."),
        ("human", "Sure?"),
        ("gpt", "Yes."),
    ]
    encoded = encode(real, turns, [1], 256)
    tokens, labels = encoded.tokens.tolist(), encoded.labels.tolist()
    head, rest = tokens[:37], tokens[37:]
    assert head[:4] == [1, 92543, 9081, 364] and head[-1] == 92542
    first = [92543, 1008, 364, 92544, *[92546] * 256, 92545, 364, 3993, 505, 563, 345, 92542]
    first += [92543, 525, 11353, 364]
    second = [92543, 1008, 364, 39584, 345, 92542, 92543, 525, 11353, 364]
    assert rest == [*first, 290, 8383, 281, 92542, *second, 9583, 281, 92542]
    x = IGNORED
    assert labels[: 37 + len(first)] == [x] * (37 + len(first))
    assert labels[37 + len(first) :] == [
        290,
        8383,
        281,
        92542,
        *[x] * len(second),
        9583,
        281,
        92542,
    ]
    assert len(tokens) == 325 and encoded.tile_start.tolist() == [41]


def test_internvl2_5_labels(standin):
    """By hand: bos as the tokenizer has it, unsupervised newlines after separators, nothing
    stripped.
    """
    turns = [("human", "Q "), ("gpt", "A dog."), ("human", "Q"), ("gpt", " A cat")]
    encoded = encode(standin, turns, template=V2_5, system="")
    plain, newline = standin.encode, standin.encode("\n")
    im_start, im_end = standin.token_id("<|im_start|>"), standin.token_id("<|im_end|>")
    expected = [
        ([standin.bos_id, im_start, *plain("system\n"), im_end, *newline], False),
        ([im_start, *plain("user\nQ "), im_end, *newline, im_start, *plain("assistant\n")], False),
        ([*plain("assistant\nA dog.")[len(plain("assistant\n")) :], im_end], True),
        (
            [
                *newline,
                im_start,
                *plain("user\nQ"),
                im_end,
                *newline,
                im_start,
                *plain("assistant\n"),
            ],
            False,
        ),
        ([*plain("assistant\n A cat")[len(plain("assistant\n")) :], im_end], True),
        (newline, False),
    ]
    assert encoded.tokens.tolist() == [id for ids, _ in expected for id in ids]
    assert encoded.labels.tolist() == [
        id if learn else IGNORED for ids, learn in expected for id in ids
    ]


def test_bos_rule(real, tmp_path):
    turns = [("human", "Q"), ("gpt", "A")]
    real.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    without = Tokenizer.load(tmp_path)
    first = {
        (template.name, tokenizer.add_bos): int(
            encode(tokenizer, turns, template=template).tokens[0]
        )
        for template in (CHAT, V2_5, get_template("Hermes-2"))
        for tokenizer in (real, without)
    }
    assert first == {
        ("internlm2-chat", True): 1,
        ("internlm2-chat", False): 1,
        ("internvl2_5", True): 1,
        ("internvl2_5", False): 92543,
        ("Hermes-2", True): 92543,
        ("Hermes-2", False): 92543,
    }


ANSWERS = [
    "A cat.",
    "1. first\n2. second",
    "图中有一只猫。",
    "𠀀",
    "<image>",
    "  padded  ",
    "<ref>a</ref><box>[[1, 2, 3, 4]]</box>",
    "<",
    "x" * 50,
    "\u2581low line",
    "\tx",
    "\r\nx",
]


@pytest.mark.parametrize("name", ["standin", "real"])
@pytest.mark.parametrize("template", [CHAT, V2_5], ids=lambda template: template.name)
def test_supervised_tokens_decode_to_the_answers(name, template, request):
    tokenizer = request.getfixturevalue(name)
    turns = [turn for answer in ANSWERS for turn in (("human", "Q"), ("gpt", answer))]
    runs = supervised_runs(encode(tokenizer, turns, template=template))
    expected = [answer.strip() if template.strip_values else answer for answer in ANSWERS]
    # SentencePiece itself writes its space mark U+2581 as a space
    expected = [answer.replace("\u2581", " ") + "<|im_end|>" for answer in expected]
    assert [tokenizer.decode(run, skip_special=False) for run in runs] == expected


def test_token_shared_by_header_and_answer_is_masked(real):
    encoded = encode(real, [("human", "Q"), ("gpt", "\nfoo")], template=V2_5)
    ids = encoded.tokens.tolist()
    both_newlines = ids.index(402)  # "\n\n" is one token
    assert encoded.labels[both_newlines] == IGNORED
    assert supervised_runs(encoded) == [[*real.encode("foo"), real.token_id("<|im_end|>")]]


@pytest.mark.parametrize("name", ["standin", "real"])
@pytest.mark.parametrize("template", [CHAT, V2_5], ids=lambda template: template.name)
def test_whole_text_has_the_ids_of_its_pieces(name, template, request):
    tokenizer = request.getfixturevalue(name)
    draw = random.Random(1)
    words = [
        " ",
        "  ",
        "\n",
        "hello",
        " world",
        "猫",
        "é",
        "1.5",
        "<ref>",
        "<|im_start|>",
        "</s>",
        "a",
    ]
    for _ in range(50):
        values = ["".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(4)]
        values = [value.strip() + "." if template.strip_values else value for value in values]
        values[0], values[2] = f"{values[0]}<image>{values[1]}", f"<image>{values[2]}"
        turns = list(zip(("human", "gpt", "human", "gpt"), values, strict=True))
        text = prompt_text(template, turns)
        for tiles in (1, 3):
            text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * (2 * tiles) + "</img>", 1)
        encoded = encode(tokenizer, turns, [1, 3], 2, template=template, special_text="allow")
        assert encoded.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_reserved_text(real):
    evil = "see <IMG_CONTEXT>, </s> and [UNUSED_TOKEN_145]"
    for turns, system in [
        ([("human", evil), ("gpt", "A")], None),
        ([("human", "Q"), ("gpt", evil)], None),
        ([("human", "Q"), ("gpt", "A")], evil),
    ]:
        with pytest.raises(SampleError, match='holds "<IMG_CONTEXT>"') as error:
            encode(real, turns, system=system)
        assert error.value.reason == "reserved_text"
        escaped = encode(real, turns, system=system, special_text="escape")
        harmless = encode(
            real, [(role, text.replace(evil, "B")) for role, text in turns], system="B"
        )
        for id in (1, 2, 92542, 92543, 92546):
            assert (escaped.tokens == id).sum() == (harmless.tokens == id).sum()
        allowed = encode(real, turns, system=system, special_text="allow")
        assert (allowed.tokens == 92546).sum() == 1


def test_placeholders_in_answers_stay_text(real):
    turns = [("human", "<image>"), ("gpt", "<image>"), ("human", "so?"), ("gpt", "<IMG_CONTEXT>")]
    encoded = encode(real, turns, [2], 3, special_text="escape")
    assert (encoded.tokens == 92546).sum() == 6 and encoded.tile_start.tolist() == [41, 44]
    assert [real.decode(run) for run in supervised_runs(encoded)] == ["<image>", "<IMG_CONTEXT>"]


def test_errors_and_empty_answers(real):
    with pytest.raises(SampleError, match="no answer to learn from") as error:
        encode(real, [("human", "Q")])
    assert error.value.reason == "no_supervision"
    with pytest.raises(SampleError, match='2 images but 1 "<image>"') as error:
        encode(real, [("human", "<image>"), ("gpt", "A")], [1, 1])
    assert error.value.reason == "placeholder_mismatch"
    assert "line 3: 2 images" in str(error.value.at("a.jsonl line 3"))
    with pytest.raises(ValueError, match=r'no added token "<\|end\|>"'):
        encode(real, [("human", "Q"), ("gpt", "A")], template=get_template("phi3-chat"))
    encoded = encode(real, [("human", "Q"), ("gpt", " "), ("human", "Q"), ("gpt", "A")])
    assert real.decode(encoded.tokens[37:], skip_special=False) == (
        "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"
        "<|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"
    )
    assert [real.decode(run) for run in supervised_runs(encoded)] == ["A"]


def test_data_modules_do_not_import_jax():
    code = (
        "import sys, internvlx_jax.data.conversations, internvlx_jax.data.encode\n"
        "import internvlx_jax.data.images\n"
        "heavy = {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
