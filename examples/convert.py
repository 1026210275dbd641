"""Converts a PyTorch folder to JAX and back: `python examples/convert.py FOLDER OUT`.

OUT/jax is what `internvlx train` and `internvlx eval` take, and OUT/torch what PyTorch loads.
"""

import sys
from pathlib import Path

from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.convert.export_hf import export_checkpoint
from internvlx_jax.convert.import_hf import import_checkpoint


def main(folder: str, out: str) -> tuple[int, int]:
    """Imports and exports without casting; returns how many arrays were verified bit for bit."""
    there, back = Path(out) / "jax", Path(out) / "torch"
    imported = import_checkpoint(HFFolder(Path(folder)), there, verify=True)
    exported = export_checkpoint(
        open_checkpoint(there), back, layout="internvl-x", dtype="keep", verify=True
    )
    return imported.verified, exported.verified


if __name__ == "__main__":
    print("{} parameters in, {} tensors out, all bit-equal".format(*main(*sys.argv[1:])))
