"""Captions an image: `python examples/caption.py CHECKPOINT IMAGE`.

CHECKPOINT is a run folder, a Hugging Face folder or a hub id.
"""

import sys

import internvlx_jax as ivx


def main(checkpoint: str, image: str) -> str:
    """Returns the caption that the model writes for one image."""
    model = ivx.load(checkpoint)
    return model.generate("Describe the image in one sentence.", images=image, max_new_tokens=64)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
