"""Scores a checkpoint on a file of questions: `python examples/evaluate.py CHECKPOINT FILE OUT`.

Each line of FILE has `question`, `answer` (a text or a list of accepted texts) and `image`.
"""

import sys

from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.job import EvalConfig, run


def main(checkpoint: str, questions: str, out: str) -> float | None:
    """Returns the share of answers that match exactly; OUT receives predictions and summary."""
    selection = EvaluationConfig(data=questions, metric="exact", max_new_tokens=16)
    (summary,) = run(EvalConfig(checkpoint=checkpoint, out_dir=out, selection=selection))
    return summary.score


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
