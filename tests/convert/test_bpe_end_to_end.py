"""A BPE model from JSONL to an export, in one test; `test_torch.py` loads it in transformers."""

import json

import pytest
from bpe_session import QUESTION, STEPS, TOKENIZER, run_session

import internvlx_jax
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.data.tokenizer import Tokenizer


@pytest.mark.slow
def test_train_resume_evaluate_chat_export(tmp_path, make_checkpoint, golden):
    session = run_session(tmp_path, make_checkpoint, golden)
    steps = [
        row["step"]
        for row in map(json.loads, (session.run / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert steps == list(range(1, STEPS + 1)) and RunFolder(session.run).step == STEPS
    (prediction,) = map(
        json.loads, (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    )
    assert prediction["prompt"] == QUESTION and prediction["error"] is None
    original = Tokenizer.load(TOKENIZER).fingerprint()
    names = {file.name for file in TOKENIZER.iterdir()}
    for folder in (session.run / "tokenizer", session.hf, session.internvl):
        assert Tokenizer.load(folder).fingerprint() == original
        assert names <= {file.name for file in folder.iterdir()}
        for name in names:
            changed = folder == session.hf and name == "tokenizer_config.json"
            assert changed or (folder / name).read_bytes() == (TOKENIZER / name).read_bytes()
    # The processor of transformers asks for the image tokens by their names, and nothing else.
    config = json.loads((session.hf / "tokenizer_config.json").read_text())
    named = config.pop("extra_special_tokens")
    assert config == json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    assert named.keys() == {
        "start_image_token",
        "end_image_token",
        "context_image_token",
        "video_token",
    }
    # The exports stand alone: what began the run is gone.
    session.source.rename(tmp_path / "moved")
    for folder in (session.hf, session.internvl):
        model = internvlx_jax.load(folder, dtype="float32")
        answer = model.generate(QUESTION, [str(session.page)], max_new_tokens=12)
        assert answer == session.answer, folder
