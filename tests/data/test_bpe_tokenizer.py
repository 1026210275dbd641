"""Byte-level BPE tokenizers: both forms of the files, labels, streaming, files that contradict."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
from test_tokenizer import random_texts

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.bpe_build import AddedToken, write_bpe_tokenizer
from internvlx_jax.data.bpe_files import read_bpe_files
from internvlx_jax.data.conversations import parse_sample
from internvlx_jax.data.encode import IGNORED, encode_prompt, encode_sample
from internvlx_jax.data.gguf_tokenizer import write_gguf_tokenizer
from internvlx_jax.data.new_tokens import NewTokens
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import GROUNDING, Tokenizer

V2_5 = get_template("internvl2_5")
FORMS = ["bpe", "bpe_older"]


@pytest.fixture
def copy(golden, tmp_path):
    """copy(form): a folder with the golden tokenizer's files, free to be changed."""

    def make(form):
        shutil.copytree(golden / "bpe" / form, tmp_path / form)
        return tmp_path / form

    return make


def change_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_golden_encodings(form, request, golden):
    tokenizer = request.getfixturevalue(form)
    rows = json.loads((golden / "bpe" / "encodings.json").read_text(encoding="utf-8"))
    assert len(rows) == 32
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special=False) == row["decoded"]
        assert tokenizer.decode(row["ids"]) == row["decoded_skip"]


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_control_tokens(form, request):
    tokenizer = request.getfixturevalue(form)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (588, 578, 576)
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    assert tokenizer.token_id("<|im_end|>") == 578 and tokenizer.image_token_id == 581
    assert tokenizer.piece(578) == "<|im_end|>" and tokenizer.piece(220) == "Ġ"
    for id in (588, -1):
        with pytest.raises(IndexError):
            tokenizer.decode([id])


def test_both_forms_are_one_tokenizer(bpe, bpe_older):
    assert bpe.fingerprint() == bpe_older.fingerprint() and bpe.added == bpe_older.added
    for text in random_texts(bpe, 300):
        assert bpe.encode(text) == bpe_older.encode(text)


def test_golden_labels(bpe, golden):
    """Every id and label of the original preprocessing, but for two listed cases."""
    rows = json.loads((golden / "bpe" / "labels.json").read_text(encoding="utf-8"))
    assert len(rows) == 17
    for row in rows:
        counts = row["num_image_token_list"]
        record = {"conversations": row["conversation"], "image": ["x"] * len(counts)}
        sample = parse_sample(record, dataset="d", line=1, where="d line 1", root="")
        arguments = dict(
            system=sample.system,
            template=V2_5,
            tokenizer=bpe,
            tiles_per_image=[1] * len(counts),
            tokens_per_tile=4,
        )
        if row["case"] == "empty_answer":  # an answer without text teaches nothing (data.md 6)
            with pytest.raises(SampleError, match="no answer to learn from"):
                encode_sample(sample.turns, **arguments)
            continue
        encoded = encode_sample(sample.turns, **arguments)
        tokens, labels = row["input_ids"], row["labels"]
        if row["case"] == "gpt_first":  # an answer without a question is dropped (data.md 2)
            header = bpe.encode("<|im_start|>assistant\n")
            end = bpe.encode("Hello.<|im_end|>\n")
            at = next(n for n in range(len(tokens)) if tokens[n : n + 3] == header)
            dropped = slice(at, at + len(header) + len(end))
            assert tokens[dropped] == header + end
            del tokens[dropped], labels[dropped]
        assert encoded.tokens.tolist() == tokens, row["case"]
        assert encoded.labels.tolist() == labels, row["case"]


def with_newlines_merged(folder):
    """The golden tokenizer with the pieces "\\n\\n" and "\\n\\n\\n", which Qwen2's has."""
    shift = 1000

    def change(fast):
        vocabulary, merges = fast["model"]["vocab"], fast["model"]["merges"]
        vocabulary |= {"ĊĊ": shift, "ĊĊĊ": shift + 1}
        merges += [["Ċ", "Ċ"], ["ĊĊ", "Ċ"]]

    change_json(folder / "tokenizer.json", change)
    return Tokenizer.load(folder)


def test_a_turn_is_encoded_as_a_whole(copy):
    """Merges cross from the header into the answer; as many tokens are masked as it has alone."""
    tokenizer = with_newlines_merged(copy("tokenizer"))
    header = tokenizer.encode("assistant\n")
    ids, masked = tokenizer.encode_plain("assistant\n", "\n\n12.50")
    assert ids == tokenizer.encode("assistant\n\n\n12.50") and masked == len(header)
    assert ids != header + tokenizer.encode("\n\n12.50") and ids[masked - 1] == 1001
    turns = [("human", "Total?"), ("gpt", "\n\n12.50")]
    encoded = encode_sample(
        turns,
        system=None,
        template=V2_5,
        tokenizer=tokenizer,
        tiles_per_image=[],
        tokens_per_tile=4,
    )
    supervised = encoded.labels[encoded.labels != IGNORED].tolist()
    assert supervised == tokenizer.encode("12.50<|im_end|>")


@pytest.mark.parametrize("form", FORMS)
def test_reserved_text(form, request):
    tokenizer = request.getfixturevalue(form)
    reserved = {id for text, id in tokenizer.added.items() if text not in GROUNDING}
    rejected = 0
    for text in random_texts(tokenizer, 300):
        escaped = tokenizer.encode(text, "escape")
        assert not reserved & set(escaped), text
        assert tokenizer.decode(escaped, skip_special=False) == text
        try:
            assert tokenizer.encode(text, "reject") == escaped == tokenizer.encode(text)
        except SampleError as error:
            assert error.reason == "reserved_text"
            rejected += 1
    assert 100 < rejected < 300


def test_tokens_that_are_not_special_are_text(copy):
    """<think> of Qwen3 is one id, which answers may hold and decoding writes out."""
    folder = copy("tokenizer")
    token = AddedToken("<think>", 588, special=False)
    change_json(folder / "tokenizer.json", lambda fast: fast["added_tokens"].append(token.entry()))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("<think>so", "reject")
    assert ids[0] == 588 and tokenizer.decode(ids) == "<think>so" and tokenizer.vocab_size == 589


def test_pickle_and_save(bpe, bpe_older, tmp_path):
    for tokenizer, number in ((bpe, 2), (bpe_older, 4)):
        state = pickle.dumps(tokenizer)
        assert len(state) < 5_000  # the files have 10 KB and more
        assert pickle.loads(state).encode("a <img>é") == tokenizer.encode("a <img>é")
        folder = tmp_path / tokenizer.path.parent.name
        tokenizer.save(folder)
        assert len(list(folder.iterdir())) == number
        assert Tokenizer.load(folder).fingerprint() == tokenizer.fingerprint()


def test_prompts_have_no_bos(bpe):
    chat = get_template("internlm2-chat")  # whose tokenizer puts <s> first, which this has not
    prompt = encode_prompt(
        "Hi", template=chat, tokenizer=bpe, tiles_per_image=[], tokens_per_tile=4
    )
    assert prompt.tokens[0] == bpe.token_id("<|im_start|>")


def test_new_tokens_in_both_forms(copy, golden, tmp_path):
    """Image tokens are added to tokenizer.json and to the older files alike."""
    wanted = ("<img>", "<loc>", "<seg>")
    texts = ["a<loc>b <seg>", "<img><loc>"]
    found = []
    for form in ("tokenizer", "tokenizer_slow"):
        folder = copy(form)
        NewTokens(folder, wanted).write(folder)
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.path.name == "tokenizer.json" and tokenizer.vocab_size == 590
        found.append([tokenizer.encode(text) for text in texts])
        assert tokenizer.token_id("<loc>") == 588 and tokenizer.token_id("<img>") == 579
    older = tmp_path / "tokenizer_slow"
    (older / "tokenizer.json").unlink()
    found.append([Tokenizer.load(older).encode(text) for text in texts])
    assert found[0] == found[1] == found[2]


def test_gguf_fields(golden, tmp_path, bpe):
    """The fields of a GGUF file give the tokenizer that they were written from."""
    files = read_bpe_files(golden / "bpe" / "tokenizer" / "tokenizer.json")
    by_id = sorted(files.fast["model"]["vocab"].items(), key=lambda item: item[1])
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [piece for piece, _ in by_id] + list(bpe.added) + ["[PAD588]"],
        "tokenizer.ggml.token_type": [1] * len(by_id) + [3] * len(bpe.added) + [5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in files.fast["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": bpe.eos_id,
        "tokenizer.ggml.padding_token_id": bpe.pad_id,
    }
    write_gguf_tokenizer(tmp_path / "out", fields, tmp_path / "m.gguf")
    found = Tokenizer.load(tmp_path / "out")
    assert (found.eos_id, found.pad_id, found.vocab_size) == (578, 576, 588)
    for text in random_texts(bpe, 100):
        assert found.encode(text) == bpe.encode(text)
    for field, value, message in (
        ("model", "llama", 'tokenizer.ggml.model is "llama"; only "gpt2"'),
        ("pre", "tekken", 'tokenizer.ggml.pre is "tekken"; known are qwen2'),
        ("tokens", ["a"], "token_type has 589 entries, tokenizer.ggml.tokens 1"),
        ("merges", ["x1 y2"], r"merges\[0\] 'x1 y2' needs a piece"),
        ("merges", [3], r"merges\[0\] is 3, not text"),
        ("tokens", 3, "tokens is 3, not a list"),
        ("eos_token_id", "</s>", "eos_token_id is '</s>', not a whole number"),
        ("eos_token_id", 9999, "eos_token_id is 9999, but tokenizer.ggml.tokens has 589"),
    ):
        with pytest.raises(ConfigError, match=f"m.gguf: .*{message}"):
            changed = fields | {f"tokenizer.ggml.{field}": value}
            write_gguf_tokenizer(tmp_path / "bad", changed, tmp_path / "m.gguf")
    del fields["tokenizer.ggml.merges"]
    with pytest.raises(ConfigError, match="the field tokenizer.ggml.merges is missing"):
        write_gguf_tokenizer(tmp_path / "bad", fields, tmp_path / "m.gguf")
    assert not (tmp_path / "bad").exists()


def test_smollm_cuts_digits_and_keeps_forms(tmp_path):
    """Rules of SmolLM2: each digit alone, no NFC; those of Qwen2 compose."""
    pieces = [*"abcde0123456789", "Ã", "©", "Ì", "ģ", "12"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    added = [
        AddedToken(token, len(pieces) + n)
        for n, token in enumerate(("<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"))
    ]
    found = {}
    for rules in ("smollm", "gpt-2", "qwen2"):
        write_bpe_tokenizer(
            tmp_path / rules,
            vocabulary,
            [("1", "2")],
            added,
            pretokenizer=rules,
            eos="<|im_end|>",
        )
        tokenizer = Tokenizer.load(tmp_path / rules)
        assert tokenizer.pad_id == tokenizer.eos_id == len(pieces)
        found[rules] = [[*map(tokenizer.piece, tokenizer.encode(x))] for x in ("12", "e\u0301")]
    assert found["gpt-2"][0] == ["12"] and found["smollm"][0] == found["qwen2"][0] == ["1", "2"]
    assert found["qwen2"][1] == ["Ã", "©"] and found["smollm"][1] == ["e", "Ì", "ģ"]


CONTRADICTIONS = {
    "cut off": ("tokenizer.json", lambda text: text[:2000], "tokenizer.json.*fetch it again"),
    "unknown piece": (
        "tokenizer.json",
        lambda text: text.replace('"merges": [', '"merges": [["x1", "y2"], ', 1),
        r"model.merges\[0\]: 'x1 y2' needs the piece 'x1', which the vocabulary does not",
    ),
    "number for a merge": (
        "tokenizer.json",
        lambda text: text.replace('"merges": [', '"merges": [7, ', 1),
        r"model.merges\[0\] 7 is no pair of pieces. Fetch it again",
    ),
    "other kind": (
        "tokenizer.json",
        lambda text: text.replace('"type": "BPE"', '"type": "Unigram"'),
        "model.type is 'Unigram'.*Copy tokenizer.model",
    ),
    "no image token": (
        "tokenizer.json",
        lambda text: text.replace("<IMG_CONTEXT>", "<CONTEXT>"),
        'no added token "<IMG_CONTEXT>".*convert import',
    ),
    "id of a piece": (
        "tokenizer.json",
        lambda text: text.replace('"id": 581', '"id": 5'),
        "id 5 is .<IMG_CONTEXT>. in .*, but ",
    ),
    "no eos": (
        "tokenizer_config.json",
        lambda text: text.replace("<|im_end|>", "<|stop|>"),
        "tokenizer_config.json: eos_token is '<|stop|>', which is no token",
    ),
    "not JSON": (
        "tokenizer_config.json",
        lambda text: "{",
        "tokenizer_config.json.*fetch it again",
    ),
}
OLDER = {
    "merges cut inside a line": (
        "merges.txt",
        lambda text: text[:1000].rsplit(" ", 1)[0],
        r"merges.txt line \d+: .* is no pair of pieces",
    ),
    "merges cut after a line": (
        "merges.txt",
        lambda text: "".join(text.splitlines(keepends=True)[:100]),
        "merges.txt makes 99 pieces, but .*vocab.json has 221 more that no merge makes",
    ),
    "merges of another vocabulary": (
        "merges.txt",
        lambda text: text.replace("r e\n", "r zz\n", 1),
        "merges.txt line 2: 'r zz' needs the piece 'zz'",
    ),
    "vocabulary cut": ("vocab.json", lambda text: text[:500], "vocab.json.*fetch it again"),
    "another id": (
        "added_tokens.json",
        lambda text: text.replace("581", "600"),
        '"<IMG_CONTEXT>" has id 600 in .*added_tokens.json, but 581 in .*tokenizer_config.json',
    ),
    "another class": (
        "tokenizer_config.json",
        lambda text: text.replace("Qwen2Tokenizer", "RobertaTokenizer"),
        "tokenizer_class 'RobertaTokenizer'; vocab.json and merges.txt are read for Qwen2",
    ),
}


@pytest.mark.parametrize(
    "form, case",
    [("tokenizer", case) for case in CONTRADICTIONS] + [("tokenizer_slow", case) for case in OLDER],
)
def test_files_that_cannot_be_used(form, case, copy):
    name, change, message = (CONTRADICTIONS | OLDER)[case]
    folder = copy(form)
    text = (folder / name).read_text(encoding="utf-8")
    assert change(text) != text
    (folder / name).write_text(change(text), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Tokenizer.load(folder)


def test_missing_merges(copy):
    folder = copy("tokenizer_slow")
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt does not exist, but vocab.json"):
        Tokenizer.load(folder)


def test_random_bytes_decode_as_python_does(bpe):
    """Ids of single bytes give the same text as UTF-8 with replacement characters."""
    letters = {bpe.piece(id): id for id in range(256)}
    table = byte_letters()
    draw = random.Random(0)
    for _ in range(200):
        data = bytes(draw.choices(range(256), k=draw.randint(1, 20)))
        ids = [letters[table[byte]] for byte in data]
        assert bpe.decode(ids) == data.decode("utf-8", errors="replace")


def byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level vocabularies: itself where visible."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + n) for n, byte in enumerate(hidden)
    }


def test_ids_are_int32(bpe):
    encoded = encode_prompt(
        "图 😀", template=V2_5, tokenizer=bpe, tiles_per_image=[1], tokens_per_tile=4
    )
    assert encoded.tokens.dtype == np.int32 and encoded.tile_start.size == 1


def test_more_ids_than_rows(bpe):
    bpe.check_rows(588)
    message = (
        "tokenizer.json: the tokenizer has 588 ids, model.decoder.vocab_size is 587 "
        '.the last is "</box>".*Use the tokenizer files of this model'
    )
    with pytest.raises(ConfigError, match=message):
        bpe.check_rows(587)


@pytest.mark.parametrize(
    "file, field, value, message",
    [
        ("tokenizer_config.json", "eos_token", ["a"], '"eos_token" is .*expected a text'),
        ("tokenizer_config.json", "pad_token", {"content": 3}, '"pad_token" is .*expected a text'),
        ("tokenizer.json", "added_tokens", [3], r"added_tokens\[0\] is 3, expected an object"),
        ("tokenizer.json", "added_tokens", [{"content": "a", "id": "1"}], "'a' has id '1'"),
        ("tokenizer.json", "added_tokens", {"a": 1}, r"added_tokens\[0\] is None"),
        ("tokenizer.json", "pre_tokenizer", ["ByteLevel"], "only byte-level BPE"),
    ],
)
def test_fields_of_another_type_are_named(copy, file, field, value, message):
    folder = copy("tokenizer")
    change_json(folder / file, lambda content: content.update({field: value}))
    with pytest.raises(ConfigError, match=f"{file}.*{message}"):
        Tokenizer.load(folder)


def test_damaged_vocabularies_and_merges_are_named(copy):
    folder = copy("tokenizer")
    change_json(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update(a="b"))
    with pytest.raises(ConfigError, match="tokenizer.json: the token 'a' has id 'b'"):
        Tokenizer.load(folder)
    folder = copy("tokenizer_slow")
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes() + b"\xff \xfe\n")
    with pytest.raises(ConfigError, match=r"merges.txt line \d+: not UTF-8: byte 0 is 0xff"):
        Tokenizer.load(folder)
    merges.write_text("#version: 0.2\n" + "x" * 5000 + " y\n")
    with pytest.raises(ConfigError, match="which the vocabulary does not have") as error:
        Tokenizer.load(folder)
    assert len(str(error.value)) < 700
