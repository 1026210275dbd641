"""Score a checkpoint on benchmarks or on a question file; docs/evaluation.md explains the flags.

python eval.py --checkpoint DIR --tasks textvqa_val,chartqa_human --data_root data
python eval.py --checkpoint DIR --data FILE.jsonl --metric exact
"""

import sys

from internvlx_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
