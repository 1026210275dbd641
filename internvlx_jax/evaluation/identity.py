"""Hashes of what a result was computed from: checkpoint, data files and settings.

(design: evaluation.md 8, 9)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WHOLE = 1 << 20  # largest checkpoint file, in bytes, that is read whole

# First digits of the md5 of the published TSV files.
TSV_MD5 = {
    "MMBench_DEV_EN": "b6caf113",
    "SEEDBench_IMG": "68017231",
    "ScienceQA_TEST": "e42e9e00",
    "AI2D_TEST": "0f593e0d",
    "RealWorldQA": "4de008f5",
    "MMMU_DEV_VAL": "585e8ad7",
    "TextVQA_VAL": "b233b31f",
    "DocVQA_VAL": "d5ee77e1",
    "InfoVQA_VAL": "2342e9c2",
    "ChartQA_TEST": "c902e0aa",
    "GQA_TestDev_Balanced": "99b62f22",
    "VizWiz": "fa4ac416",
    "MathVista_MINI": "f199b98e",
    "LLaVABench": "d382a093",
    "MMVet": "748aa6d4",
    "MME": "b36b43c3",
    "HallusionBench": "0c23ac0d",
    "POPE": "c12f5acb",
    "MMBench_DEV_EN_V11": "30c05be8",
    "MMBench_TEST_EN_V11": "8d1a704e",
    "MMBench_DEV_CN_V11": "593f9b5f",
    "MMBench_TEST_CN_V11": "156e6569",
    "SEEDBench2_Plus": "e32d3216",
    "AI2D_TEST_NO_MASK": "fd8f4636",
    "MMStar": "e1ecd214",
    "BLINK": "d5e8af14",
    "MUIRBench": "2e5e6fd7",
    "MMMU_Pro_10c": "22cee868",
    "MMMU_Pro_V": "d01441a8",
    "OCRBench": "e953d98a",
    "MathVision": "93f6de14",
    "MathVision_MINI": "060fe4fa",
    "MathVerse_MINI": "5017caca",
    "MathVerse_MINI_Vision_Only": "68a11d46",
    "MathVerse_MINI_Vision_Dominant": "b8fb6385",
    "MathVerse_MINI_Vision_Intensive": "01cbd35b",
    "MathVerse_MINI_Text_Lite": "19e4b13b",
    "MathVerse_MINI_Text_Dominant": "4f5cd2fa",
    "ChartQAPro": "27653ea8",
    "RefCOCO": "f50ca356",
    "MVBench": "fd21d365",
    "Video-MME": "85bdd91f",
}


def file_hashes(paths: Iterable[Path]) -> tuple[dict[str, str], list[str]]:
    """Hashes data files.

    Returns:
        (sha256 of each file by FOLDER/NAME, a note for each TSV that is not the published one).
    """
    hashes, notes = {}, []
    for path in paths:
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
                md5.update(block)
        hashes[f"{path.parent.name}/{path.name}"] = sha.hexdigest()
        published = TSV_MD5.get(path.stem) if path.suffix == ".tsv" else None
        if published and not md5.hexdigest().startswith(published):
            notes.append(
                f"{path.name} is not the published file (md5 {md5.hexdigest()[:8]}, "
                f"expected {published})"
            )
    return hashes, notes


def checkpoint_hash(folder: Path) -> str:
    """Identifies a checkpoint without reading all of it.

    The hash covers names and sizes of all files, small files whole, and the first and the last
    megabyte of the others.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE))
            if size > WHOLE:
                file.seek(-min(WHOLE, size - WHOLE), 2)
                digest.update(file.read())
    return digest.hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that identify settings, whatever the order of their names."""
    return hashlib.sha256(
        json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:16]
