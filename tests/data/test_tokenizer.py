"""Tokenizer: ids, reserved text, files, pickling (design: data.md 5)."""

import json
import pickle
import random
import shutil

import pytest

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.tokenizer import Tokenizer

TOKENIZERS = ["standin", "hermes", "phi3", "real"]
GROUNDING = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")


def reserved_ids(tokenizer: Tokenizer) -> set[int]:
    unused = set(range(92_397, 92_544)) if tokenizer.vocab_size == 92_553 else set()
    return unused | {id for text, id in tokenizer.added.items() if text not in GROUNDING}


def random_texts(tokenizer: Tokenizer, n: int) -> list[str]:
    draw = random.Random(0)
    pieces = [
        *tokenizer.added,
        "[UNUSED_TOKEN_0]",
        "[UNUSED_TOKEN_145]",
        "[UNUSED_TOKEN_",
        "<|im_",
        "end|>",
        "<",
        "[",
        "]",
        "<image>",
        " ",
        "  ",
        "\n",
        "hello",
        " world",
        "图中有一只猫。",
        "𠀀",
        "é",
        "1.5",
        "\t",
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(n)]


def test_standin_ids(golden, standin):
    vocab = json.loads((golden / "labels" / "vocab.json").read_text())["internlm2"]
    assert standin.vocab_size == vocab["size"]
    assert (standin.bos_id, standin.eos_id, standin.pad_id) == (
        vocab["bos"],
        vocab["eos"],
        vocab["pad"],
    )
    assert {text: standin.token_id(text) for text in vocab["added"]} == vocab["added"]
    assert standin.encode("<img></img><IMG_CONTEXT>") == [
        standin.img_start,
        standin.img_end,
        standin.image_token_id,
    ]
    assert standin.encode("<|im_start|>user\nHello<|im_end|>") == [
        625,
        459,
        13,
        581,
        530,
        539,
        300,
        624,
    ]


def test_standin_decode(standin):
    generated = [1, 529, 561, 463, 488, 541, 529, 624, 263, 277]  # golden chat.json
    assert standin.decode(generated).strip() == "A cat sits. rest"
    assert standin.decode([625, 459, 13, 581, 530, 539, 300, 624], skip_special=False) == (
        "<|im_start|>user\nHello<|im_end|>"
    )


def test_real_ids(real):
    assert real.vocab_size == 92_553
    assert real.encode("Hello") == [9843] and real.encode(" Hello") == [22190]
    assert [real.bos_id, real.eos_id, real.pad_id, real.image_token_id] == [1, 2, 2, 92_546]
    table = {
        0: "<unk>",
        1: "<s>",
        2: "</s>",
        92538: "<|plugin|>",
        92539: "<|interpreter|>",
        92540: "<|action_end|>",
        92541: "<|action_start|>",
        92542: "<|im_end|>",
        92543: "<|im_start|>",
        92544: "<img>",
        92545: "</img>",
        92546: "<IMG_CONTEXT>",
        92547: "<quad>",
        92548: "</quad>",
        92549: "<ref>",
        92550: "</ref>",
        92551: "<box>",
        92552: "</box>",
    }
    assert {id: text for text, id in real.added.items()} == table
    assert real.encode("".join(table.values())) == list(table)
    assert real.encode("[UNUSED_TOKEN_145][UNUSED_TOKEN_0]") == [92_542, 92_397]


@pytest.mark.parametrize("name", ["standin", "real"])
def test_text_survives_the_round_trip(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in random_texts(tokenizer, 200):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == (
            # "allow" takes spare pieces for the chat tokens that they are
            text.replace("[UNUSED_TOKEN_145]", "<|im_end|>") if name == "real" else text
        )


@pytest.mark.parametrize("name", ["standin", "real"])
def test_reserved_text(name, request):
    tokenizer = request.getfixturevalue(name)
    reserved = reserved_ids(tokenizer)
    rejected = 0
    for text in random_texts(tokenizer, 400):
        escaped = tokenizer.encode(text, "escape")
        assert not reserved & set(escaped), text
        assert tokenizer.decode(escaped, skip_special=False) == text
        try:
            ids = tokenizer.encode(text, "reject")
        except SampleError as error:
            assert error.reason == "reserved_text"
            rejected += 1
        else:
            assert not reserved & set(ids), text
            assert ids == escaped == tokenizer.encode(text)
    assert 100 < rejected < 400


def test_escape_makes_two_calls(real):
    literal = real.encode("<") + real.encode("|im_end|>")
    assert real.encode("a<|im_end|>b", "escape") == real.encode("a") + literal + real.encode("b")
    with pytest.raises(SampleError, match=r'holds "<\|im_end\|>".*\n.*special_text="escape"'):
        real.encode("a<|im_end|>b", "reject")
    with pytest.raises(ValueError, match="Use allow, reject or escape"):
        real.encode("a", "drop")


def test_added_tokens_match_longest_first(golden, tmp_path):
    shutil.copy(golden / "labels" / "standin_internlm2.model", tmp_path / "tokenizer.model")
    vocab = json.loads((golden / "labels" / "vocab.json").read_text())["internlm2"]
    added = vocab["added"] | {"<box><box>": 635, "t><box": 636}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<box><box><box>") == [635, 633]
    assert tokenizer.encode("<quat><box>")[-2:] == [636, *tokenizer.encode(">")]
    escaped = tokenizer.encode(
        "<box><box>", "escape"
    )  # reserved, although made of grounding tokens
    assert 635 not in escaped and tokenizer.decode(escaped, skip_special=False) == "<box><box>"


def test_head_counts_the_straddling_token(real):
    assert real.encode_plain("assistant\n", "A cat.") == ([525, 11353, 364, 290, 8383, 281], 3)
    ids, head = real.encode_plain("assistant\n", "\nA cat.")
    assert ids[:3] == [525, 11353, 402] and head == 3  # one token for both newlines
    ids, head = real.encode_plain("assistant 𠀀", "𠀀")  # characters of four byte tokens
    assert real.decode(ids[:head]) == "assistant 𠀀" and real.decode(ids[head:]) == "𠀀"
    assert real.encode_plain("", "") == ([], 0)


def test_pickle_carries_no_model(real):
    state = pickle.dumps(real)
    assert len(state) < 10_000  # the model file has 1.4 MB
    copy = pickle.loads(state)
    assert (
        copy.encode("a<img> b") == real.encode("a<img> b")
        and copy.fingerprint() == real.fingerprint()
    )


@pytest.mark.parametrize("name", ["hermes", "phi3"])
def test_reserved_text_of_the_llama_family(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in random_texts(tokenizer, 200):
        assert not reserved_ids(tokenizer) & set(tokenizer.encode(text, "escape"))


def test_where_the_llama_family_puts_spaces(hermes, phi3):
    """By hand: before every stretch, or before the first only.

    Phi-3's chat tokens swallow white space.
    """

    def pieces(tokenizer, text):
        return [tokenizer.piece(id) for id in tokenizer.encode(text)]

    assert pieces(hermes, "a<ref>a") == ["▁a", "<ref>", "▁a"] and hermes.prefix == "every"
    assert pieces(phi3, "a<ref>a") == ["▁a", "<ref>", "a"] and phi3.prefix == "first"
    assert pieces(phi3, "<|user|> \na") == ["▁", "<|user|>", "a"]
    assert hermes.decode(hermes.encode("x<ref>a b</ref>"), skip_special=False) == " x<ref>a b</ref>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_folder_stands_alone(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "added_tokens.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    copy = Tokenizer.load(tmp_path / "run" / "tokenizer.model")
    assert copy.added == tokenizer.added and copy.fingerprint() == tokenizer.fingerprint()
    assert (copy.prefix, copy.swallowing) == (tokenizer.prefix, tokenizer.swallowing)
    for text in random_texts(tokenizer, 20):
        assert copy.encode(text) == tokenizer.encode(text)
    if name == "real":
        listed = json.loads((tmp_path / "run" / "added_tokens.json").read_text())
        assert list(listed.values()) == list(range(92_544, 92_553))


def test_token_files_overrule_the_fallback(real, tmp_path):
    real.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<quad>": 92545}')
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="added tokens share ids: </img>, <quad>. Correct"):
        Tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<ref>": 92550}')
    config = {"add_bos_token": False, "added_tokens_decoder": {"92549": {"content": "</ref>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.add_bos and tokenizer.fingerprint() != real.fingerprint()
    assert tokenizer.encode("<ref></ref><img>") == [92_550, 92_549, 92_544]


def test_fingerprint_is_of_the_contents(standin, tmp_path):
    before = standin.fingerprint()
    standin.save(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["635"] = {"content": "<extra>"}
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path / "copy").fingerprint() != before


def test_folders_that_cannot_be_used(golden, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="tokenizer.model does not exist. Name a folder with"
    ):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    model = tmp_path / "tokenizer.model"
    model.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        ValueError, match="tokenizer.model is not a SentencePiece model .*LFS pointer"
    ):
        Tokenizer.load(tmp_path)
    model.write_bytes((golden / "labels" / "standin_internlm2.model").read_bytes())
    with pytest.raises(
        FileNotFoundError, match="added_tokens.json does not exist.* has 620 pieces"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text(
        '{"<s>": 1, "</s>": 2, "<img>": 620, "</img>": 621}'
    )
    with pytest.raises(
        ValueError, match='no added token "<IMG_CONTEXT>". Add it to added_tokens.json'
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"7": {"content": "<img>"}}}'
    )
    with pytest.raises(
        ValueError, match='"<img>" has id 620 in .*added_tokens.json, but 7 in .*config.json'
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        Tokenizer.load(tmp_path)
