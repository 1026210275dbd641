"""Checkpoints that are written to the local disk first, and copied to an object store.

(design: platform.md 8)

The stage of a run is a folder of local_checkpoint_dir with the same layout, checkpoints/STEP. A
step that is complete there is copied in the background, its marker last. A run that is started
again goes on from the newest complete step of both places; what it lacks here is fetched.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvlx_jax.checkpoints.agreement import on_first_process
from internvlx_jax.checkpoints.run_format import finished_steps
from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import RemotePath, is_remote
from internvlx_jax.core.remote import protocol_of
from internvlx_jax.core.uploads import MARKER, copy_tree, upload_folder

logger = logging.getLogger(__name__)

IDENTITY = "stage.json"  # the same in a run folder and in its stage
LOOK_SECONDS = 0.5


def stage_of(run: Path, local: str | None) -> Path | None:
    """Returns the local folder into which a run's checkpoints are written; None without one.

    Raises:
        ConfigError: The run folder needs one, or cannot have one.
    """
    if local is None:
        if protocol_of(run) == "s3":  # orbax writes arrays to gs:// and to disks only
            raise ConfigError(
                f"output_dir {run}: checkpoints cannot be written to s3:// directly; set "
                "local_checkpoint_dir to a folder on the local disk, from which they are copied"
            )
        return None
    if not is_remote(run):
        raise ConfigError(
            f"local_checkpoint_dir {local} is for an output_dir in gs:// or s3://, not for {run}; "
            "remove it"
        )
    name = f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:12]}"
    return Path(local).absolute() / name


def prepare_stage(run: Path, stage: Path) -> None:
    """Brings the newest complete step of a run into its stage; all processes call it.

    A stage of an earlier run of the same name is emptied. Nothing is written to the run folder.

    Raises:
        ConfigError: The processes do not share the stage.
    """
    on_first_process(lambda: _fetch_newest(run, stage))
    seen = np.array((stage / IDENTITY).is_file())
    if jax.process_count() > 1 and not multihost_utils.process_allgather(seen).all():
        raise ConfigError(
            f"local_checkpoint_dir {stage.parent} is not the same folder in all processes; hosts "
            "without a shared disk write their checkpoints to gs:// directly (remove "
            "local_checkpoint_dir)"
        )


def _fetch_newest(run: Path, stage: Path) -> None:
    mark, wanted = stage / IDENTITY, run / IDENTITY
    belongs = wanted.is_file() and mark.is_file() and mark.read_bytes() == wanted.read_bytes()
    with named_on_error(stage):
        if not belongs:
            shutil.rmtree(stage, ignore_errors=True)
        (stage / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = wanted.read_bytes() if wanted.is_file() else uuid.uuid4().hex.encode()
        mark.write_bytes(text)
    here, there = max(finished_steps(stage), default=-1), max(finished_steps(run), default=-1)
    if here >= there:
        if here > there:
            logger.info(f"going on from checkpoint {here} of {stage}, which was not copied yet")
        return
    aside = stage / f"fetched-{there}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    with named_on_error(stage):
        copy_tree(run / "checkpoints" / str(there), aside)
        (aside / MARKER).unlink(missing_ok=True)  # on a disk the name makes a step complete
        aside.rename(stage / "checkpoints" / str(there))
    logger.info(f"fetched checkpoint {there} of {run} to {stage}")


class CheckpointCopies(AbstractContextManager):
    """Copies the steps of a stage to its run folder in a thread of process 0.

    As a context manager it ends when all complete steps are copied.

    Args:
        stage: Local folder with checkpoints/STEP; None does nothing.
        run: Run folder in an object store.
        keep_last: Complete steps that are kept there.
    """

    def __init__(self, stage: Path | None, run: Path, keep_last: int):
        self._stage, self._run, self._keep = stage, run, keep_last
        self._copied: list[int] = []  # complete steps in the run folder
        self._ending = threading.Event()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> CheckpointCopies:
        if self._stage is not None:
            on_first_process(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._stage is None:
            return
        if kind is None:
            on_first_process(self._finish)
        elif self._thread is not None:
            try:
                self._finish()
            except OSError as error:  # what ends the run says more
                logger.warning(f"checkpoints are left in {self._stage}: {error}")

    def check(self) -> None:
        """Raises what has kept a step from being copied; in process 0 only."""
        if self._error is not None:
            raise self._error

    def _begin(self) -> None:
        assert self._stage is not None
        (self._run / IDENTITY).write_bytes((self._stage / IDENTITY).read_bytes())
        self._copied = remove_unfinished(self._run)
        self._thread = threading.Thread(target=self._work, name="checkpoint copies", daemon=True)
        self._thread.start()

    def _finish(self) -> None:
        assert self._thread is not None
        self._ending.set()
        self._thread.join()
        self.check()

    def _work(self) -> None:
        try:
            while not self._ending.wait(LOOK_SECONDS):
                self._copy_new()
            self._copy_new()  # what the last save has added
        except Exception as error:  # raised where the run looks for it
            self._error = error

    def _copy_new(self) -> None:
        assert self._stage is not None
        for step in finished_steps(self._stage):
            if step > max(self._copied, default=-1):
                self._copy(step)
        for step in self._copied[: -self._keep]:
            remove_step(self._run / "checkpoints" / str(step))
            self._copied.remove(step)

    def _copy(self, step: int) -> None:
        assert self._stage is not None
        source = self._stage / "checkpoints" / str(step)
        target = self._run / "checkpoints" / str(step)
        assert isinstance(target, RemotePath)
        try:
            upload_folder(source, target)
        except FileNotFoundError:
            if source.exists():
                raise
            return  # newer steps have replaced it meanwhile
        (target / MARKER).write_text("")
        self._copied.append(step)
        logger.info(f"copied checkpoint {step} to {self._run}")


def remove_unfinished(run: Path) -> list[int]:
    """Removes what earlier starts have left of steps in an object store; the run has the lock.

    Args:
        run: Run folder; nothing is removed from one on a disk.

    Returns:
        Its complete steps, in order.
    """
    folder, complete = run / "checkpoints", finished_steps(run)
    kept = set(map(str, complete))
    for step in folder.iterdir() if folder.is_dir() else ():
        if step.name not in kept and isinstance(step, RemotePath):
            logger.info(f"removing {step}, which is not complete")
            step.rmtree()
    return complete


def remove_step(step: Path) -> None:
    """Removes a complete step of an object store, its marker first."""
    assert isinstance(step, RemotePath)
    (step / MARKER).unlink(missing_ok=True)
    step.rmtree()
