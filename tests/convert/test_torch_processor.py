"""AutoProcessor of transformers loads an export that came without a processor's files.

`make test-torch` runs these beside torchvision, which that processor needs, where they may not be
skipped.
"""

import os

import numpy as np
import pytest

if os.environ.get("REQUIRE_TORCHVISION") != "1":
    for package in ("torch", "torchvision"):
        pytest.importorskip(package, reason="needs torchvision and transformers: make test-torch")

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # PyPI's is built for CUDA. Beside a torch without it, its operators are missing; they find
    # boxes, and nothing here calls them, but they have to be declared.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from bpe_session import QUESTION, run_session
from PIL import Image
from transformers import AutoProcessor, InternVLForConditionalGeneration

from internvlx_jax import load_pretrained
from internvlx_jax.cli.convert import main
from internvlx_jax.data.encode import encode_prompt
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tiles import cut_tiles, normalize
from internvlx_jax.data.tokenizer import Tokenizer

CUT = ("dynamic_image_size=true", "use_thumbnail=true")
LEVEL = 1 / 255 / 0.224  # one of 255, as it is after normalization


@pytest.fixture(scope="module")
def session(tmp_path_factory, make_checkpoint, golden):
    return run_session(tmp_path_factory.mktemp("processor"), make_checkpoint, golden)


def encoded(processor, messages):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def ask(question, image=None):
    parts = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_prompt_pixels_and_answer(session):
    """Ids and tiles of our own encoding, and the answer that the chat gave."""
    processor = AutoProcessor.from_pretrained(session.hf)
    image = Image.open(session.page).convert("RGB")
    inputs = encoded(processor, ask(QUESTION, image))
    loaded = load_pretrained(session.run, dtype="float32")
    prompt, tokenizer = loaded.config.prompt, Tokenizer.load(session.hf)
    tiles = cut_tiles(image, prompt.tiles)
    tokens = encode_prompt(
        f"<image>\n{QUESTION}",
        system=prompt.system_message,
        template=get_template(prompt.template),
        tokenizer=tokenizer,
        tiles_per_image=[len(tiles)],
        tokens_per_tile=loaded.config.tokens_per_tile,
    ).tokens
    np.testing.assert_array_equal(inputs["input_ids"][0].numpy(), tokens)
    ours = normalize(tiles).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(inputs["pixel_values"].numpy(), ours, atol=2 * LEVEL)

    model = InternVLForConditionalGeneration.from_pretrained(session.hf, dtype=torch.float32)
    with torch.no_grad():
        written = model.eval().generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
    answer = processor.decode(written[0][len(tokens) :], skip_special_tokens=True)
    assert answer.strip() == session.answer


@pytest.mark.parametrize(
    "fields, size, tiles",
    [
        (["template=internvl2_5", "max_dynamic_patch=4", *CUT], (112, 112), 5),
        (["template=internvl_hf"], (112, 56), 1),
        (["template=Hermes-2", "system_message=You see."], (50, 50), 1),
    ],
)
def test_other_prompts_and_tilings(session, tmp_path, fields, size, tiles):
    source = str(session.source)
    flags = ["--from", source, "--to", str(tmp_path / "jax"), "--field", *fields]
    if "system_message" not in " ".join(fields):
        flags.append("system_message=null")
    assert main(["import", *flags]) == 0
    out = tmp_path / "hf"
    assert (
        main(["export", "--from", str(tmp_path / "jax"), "--to", str(out), "--layout", "hf"]) == 0
    )
    image = Image.effect_noise(size, 50).convert("RGB")
    inputs = encoded(AutoProcessor.from_pretrained(out), ask("What?", image))
    assert inputs["pixel_values"].shape[0] == tiles
    config = load_pretrained(out, dtype="float32").config
    tokens = encode_prompt(
        "<image>\nWhat?",
        system=config.prompt.system_message,
        template=get_template(config.prompt.template),
        tokenizer=Tokenizer.load(out),
        tiles_per_image=[tiles],
        tokens_per_tile=config.tokens_per_tile,
    ).tokens
    np.testing.assert_array_equal(inputs["input_ids"][0].numpy(), tokens)
