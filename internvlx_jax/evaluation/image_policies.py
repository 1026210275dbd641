"""How the images of a question share the tile maximum (design: evaluation.md 4)."""

from __future__ import annotations

import dataclasses

from internvlx_jax.inference.requests import ImagePolicy

VLMEVALKIT_TILES = 64  # per question, over all of its images

VLMEVALKIT = ImagePolicy(
    limits=lambda most, images: [max(1, min(most, VLMEVALKIT_TILES // images))] * images
)
# MMMU in VLMEvalKit; the first image is doubled before its grid is chosen.
VLMEVALKIT_MMMU = dataclasses.replace(VLMEVALKIT, enlarge_first=2)
MMMU_GRID = ImagePolicy(
    limits=lambda most, images: [most] + [1] * (images - 1), one_block=True, enlarge_first=2
)
FIRST_ONLY = ImagePolicy(limits=lambda most, images: [1], one_block=True)
FRAMES = ImagePolicy(limits=lambda most, images: [1] * images)  # one tile per frame of a video
