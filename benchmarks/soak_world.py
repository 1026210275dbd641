"""What soak.py disturbs: a disk of its own, pages, an object store that stalls, processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.run_config import ComputeConfig, MeshConfig, OptimizerConfig, TrainConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "gcs_server.py"
PAGES = "synthetic_pages"
DISK = "48m"  # has room for a dozen checkpoints
SLOW: tuple[dict[str, float], ...] = (
    {},
    {"stall": 0.1, "seconds": 1.5},
    {"unavailable": 0.05, "cut": 0.05},
    {"stall": 0.02, "seconds": 8},
)
CONFIG = """import json
from pathlib import Path
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.run_config import TrainConfig

def get_config():
    return from_dict(TrainConfig, json.loads(Path(__file__).with_suffix(".json").read_text()))
"""


def mount_command(folder: Path) -> list[str]:
    """Returns what mounts a small disk, in the mount namespace of the caller."""
    return ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(folder)]


def own_namespace() -> list[str]:
    """Returns the command prefix under which mounts are permitted, and end with the program."""
    return ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]


def may_mount() -> bool:
    """Returns whether a small disk can be mounted in a namespace of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [*own_namespace(), *mount_command(Path(scratch))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


class Disk:
    """The disk of the run folder, which can be filled.

    Attributes:
        mounted: Whether it is one of its own; a shared disk is never filled.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.mounted = subprocess.run(mount_command(folder), capture_output=True).returncode == 0
        self._ballast = folder / "ballast"

    def fill(self, leave: int) -> None:
        """Takes all of the free space but `leave` bytes."""
        free = shutil.disk_usage(self.folder).free
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as file:
            while (left := free - leave) > 0:
                free -= file.write(b"\0" * min(left, 2**20))

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


class Store:
    """gs://bucket of the emulator that the tests use, with stalls, refusals and cut answers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._address = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self._address,
            "TENSORSTORE_GCS_HTTP_URL": self._address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self.counted: dict[str, int] = {}

    def put(self, name: str, content: bytes) -> None:
        self._send("POST", f"/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name)}",
                   content)  # fmt: skip

    def faults(self, shares: dict[str, float]) -> None:
        """Injects these from now on, and adds up what was injected until now."""
        for name, count in json.loads(
            self._send("PUT", "/_faults", json.dumps(shares).encode())
        ).items():
            self.counted[name] = self.counted.get(name, 0) + count

    def _send(self, method: str, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(self._address + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def close(self) -> None:
        self._process.communicate("\n")


def environment(folder: Path, store: Store | None, devices: int) -> dict[str, str]:
    """Returns the environment of a process of a soak, with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # later ones do not know it
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {
        # Read back, programs hang: the order of their collectives is lost.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **os.environ,
        **(store.environment if store else {}),
        "SOAK_OF": str(folder),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        "JAX_PLATFORMS": "cpu",
        "JAX_OPTIMIZATION_LEVEL": "O0",
        "NPROC": "16",
        # Compiles in a fifth of the time; what is computed is as exact.
        "XLA_FLAGS": flags,
    }


class Pages:
    """Training pages on the disk and in the store, and validation pages, sizes left to headers."""

    def __init__(self, folder: Path, store: Store | None):
        generate(folder, SyntheticConfig(train_samples=60, val_samples=6, text_share=0.2))
        for name in ("train", "val"):
            path = folder / PAGES / f"{name}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(_unsized(row)) + "\n" for row in rows))
        self.folder = folder
        self.meta, self.val_meta = folder / FILES["meta_train"], folder / FILES["meta_val"]
        self._replaced: dict[Path, bytes] = {}
        if store is not None:
            self._split(store)

    def _split(self, store: Store) -> None:
        """Puts every second sample, with its images, behind a URL."""
        path = self.folder / PAGES / "train.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[::2]) + "\n")
        remote = path.with_name("stored.jsonl")
        remote.write_text("\n".join(lines[1::2]) + "\n")
        for image in sorted((self.folder / PAGES / "images" / "train").iterdir()):
            store.put(f"soak/images/train/{image.name}", image.read_bytes())
        meta = json.loads(self.meta.read_text())
        entry = {"root": "gs://bucket/soak", "annotation": f"{PAGES}/{remote.name}"}
        self.meta.write_text(json.dumps(meta | {"stored": entry}))

    def replace(self, split: str) -> str:
        """Gives the images of a split thrice their width, until `restore`; returns an example.

        Other proportions give other tiles, by any rule.
        """
        images = sorted((self.folder / PAGES / "images" / split).iterdir())
        for path in images:
            self._replaced.setdefault(path, path.read_bytes())
            with Image.open(path) as image:
                wider = image.resize((3 * image.width, image.height))
            wider.save(path)
        return images[0].name

    def restore(self) -> None:
        for path, content in self._replaced.items():
            path.write_bytes(content)
        self._replaced.clear()


def _unsized(row: dict[str, Any]) -> dict[str, Any]:
    sizes = ("width", "height", "width_list", "height_list")
    return {name: value for name, value in row.items() if name not in sizes}


def tiny_run(output_dir: Path, pages: Pages, steps: int, save_every: int) -> TrainConfig:
    """Returns a run that compiles in seconds and reads pages, in one bucket."""
    model = ModelConfig(
        vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=32, image_size=56),
        projector=ProjectorConfig(drop_path=0.1),
        decoder=DecoderConfig(
            vocab_size=656, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56, max_num=2)),
    )
    return TrainConfig(
        output_dir=str(output_dir),
        model=model,
        data=DataConfig(
            meta=str(pages.meta),
            val_meta=str(pages.val_meta),
            tokenizer=str(TOKENIZER_FOLDER),
            max_length=256,
            tokens_per_step=1024,
            max_executables=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        compute=ComputeConfig(dtype="float32", remat="none"),
        mesh=MeshConfig(data=4, fsdp=2),
        steps=steps,
        log_every=1,
        eval_every=2 * save_every,
        save_every=save_every,
    )


def write_config(config: TrainConfig, file: Path) -> Path:
    """Writes a file for `train --config`."""
    file.write_text(CONFIG)
    file.with_suffix(".json").write_text(json.dumps(to_dict(config)))
    return file


@dataclasses.dataclass(frozen=True)
class Reading:
    """Holds the resident memory of a process, in MB, so many seconds after its start."""

    process: int
    seconds: float
    rss: float


class Watch:
    """Reads the memory of the processes of a start once a second, in a thread."""

    def __init__(self, processes: Sequence[subprocess.Popen]):
        self.readings: list[Reading] = []
        self._ids, self._begun = [each.pid for each in processes], time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ending.wait(1.0):
            for number, process in enumerate(self._ids):
                with contextlib.suppress(OSError, IndexError):
                    text = Path(f"/proc/{process}/status").read_text()
                    rss = int(text.split("VmRSS:")[1].split()[0]) / 1000
                    self.readings.append(Reading(number, time.monotonic() - self._begun, rss))

    def end(self) -> list[Reading]:
        self._ending.set()
        self._thread.join()
        return self.readings


def marked(mark: str) -> list[int]:
    """Returns the processes whose environment holds a mark, as those of a start do."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (each / "environ").read_bytes():
                    found.append(int(each.name))
    return found


def end_marked(mark: str, patience: float) -> int:
    """Waits for marked processes to end, ends the others, and returns how many these were."""
    until = time.monotonic() + patience
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return len(left)
