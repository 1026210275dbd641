"""Analytic FLOPs against the check values of training.md 8 and against XLA's count of an unrolled model."""

import dataclasses

import jax
import numpy as np
import pytest

from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.presets import internvlx_2b, internvlx_8b


@pytest.mark.parametrize("model, pvtc, token, row", [(internvlx_2b(), 103.1, 3.399, 15.57), (internvlx_8b(), 395.2, 14.717, 64.68)])
def test_check_values(model, pvtc, token, row):
    one_tile = forward_flops(model, tiles=1, lengths=[0])
    assert one_tile.tower / 1e9 == pytest.approx(723.6, abs=0.05)
    assert one_tile.projector / 1e9 == pytest.approx(pvtc, abs=0.05)
    tokens = forward_flops(model, tiles=0, lengths=[1] * 1000)  # attention of single tokens is negligible
    assert tokens.total / 1e12 == pytest.approx(token, rel=1e-3)
    assert forward_flops(model, tiles=0, lengths=[4096]).total / 1e12 == pytest.approx(row, rel=1e-3)
