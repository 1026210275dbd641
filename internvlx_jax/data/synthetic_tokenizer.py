"""Trains the small SentencePiece tokenizer of the generated dataset (design: data.md 5).

    python -m internvlx_jax.data.synthetic_tokenizer --out DIR

The tokenizer has the traits of InternLM2's: byte fallback, no text normalization, no dummy prefix,
spaces kept, the chat and image tokens appended after the pieces. Every answer of the dataset is one
piece after the answer header, and the default system texts take few pieces.
"""

import argparse
import io
import string
from pathlib import Path

import sentencepiece

from internvlx_jax.data.new_tokens import IMAGE_TOKENS
from internvlx_jax.data.sentencepiece_files import write_tokenizer_files
from internvlx_jax.data.synthetic import text_samples
from internvlx_jax.data.synthetic_pages import KINDS
from internvlx_jax.data.templates import get_template

PIECES = 640
ADDED_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
    *IMAGE_TOKENS,
)
SYSTEM_TEXTS = tuple(
    get_template(name).system_message for name in ("internlm2-chat", "internvl2_5")
)


def _training_lines() -> list[str]:
    values = {value for kind in KINDS.values() for value in kind.values}
    questions = [question for kind in KINDS.values() for question in kind.questions]
    # Repeated, so that merges go to these texts first.
    lines = 20 * [*SYSTEM_TEXTS, "system", "user", "assistant", *sorted(values)]
    lines += [
        where + question
        for where in ("", "First page: ", "Second page: ")
        for question in questions
    ]
    return lines + [question for question, _ in text_samples()] + ["Image-1: ", "Image-2: "]


def train_tokenizer(folder: Path) -> None:
    """Trains the tokenizer and writes its files to `folder`.

    The files are tokenizer.model, added_tokens.json and tokenizer_config.json. Ids: 0 <unk>, 1 <s>,
    2 </s>, then 256 bytes, merges and characters up to 640, then ADDED_TOKENS.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_training_lines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        split_digits=True,
        max_sentencepiece_length=32,  # the longest clause of a system text has 28 characters
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        token: PIECES + i for i, token in enumerate(ADDED_TOKENS)
    }
    write_tokenizer_files(folder, model.getvalue(), tokens, add_bos=True, pieces=PIECES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tokenizer of the generated dataset.")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    train_tokenizer(parser.parse_args().out)
