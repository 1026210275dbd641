"""Keeps compiled programs from one start to the next (design: platform.md 9).

JAX writes each program that takes a while to compile to a folder and finds it there by a hash of
the program, the compiler and the device. The folder is that of the user's caches; the environment
variable INTERNVLX_COMPILE_CACHE names another one, or a gs:// or s3:// URL, and `off` keeps
nothing. Whoever has set a folder for JAX itself (JAX_COMPILATION_CACHE_DIR) keeps that.

Several devices of a CPU keep nothing by default: XLA forgets the order of collectives in a program
that it reads back, and the devices may wait for each other for ever (design: platform.md 6).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import filelock
import jax

from internvlx_jax.core.chips import GIB
from internvlx_jax.core.paths import as_path, is_remote
from internvlx_jax.core.uploads import cache_folder

logger = logging.getLogger(__name__)

VARIABLE = "INTERNVLX_COMPILE_CACHE"
OFF = "off"
MOST_BYTES = 4 * GIB  # in a local folder; programs that were not used for longest give way
LEAST_SECONDS = 0.1  # of compilation; reading a smaller program back is not much faster
LOCK = ".lockfile"  # JAX's own, which it holds while it reads or writes
LOCK_SECONDS = 10.0


def keep_compiled() -> Path | None:
    """Makes JAX read programs from the cache, and write those that it compiles.

    Called before the first compilation of a command, and as often as one likes.

    Returns:
        The folder; None if nothing is kept, as with several devices of a CPU, or where JAX's own
        settings decide.

    Raises:
        ConfigError: INTERNVLX_COMPILE_CACHE is a URL that cannot be used.
    """
    config: Any = jax.config  # makes its settings at run time
    stated = os.environ.get(VARIABLE)
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    if stated == OFF:
        return None
    if may_hang_when_read_back():
        logger.info("compiled programs are not kept: several CPU devices can hang in them")
        return None
    folder = as_path(stated) if stated else cache_folder() / "compiled"
    if not is_remote(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_halves(folder)
        except (OSError, filelock.Timeout) as error:
            logger.warning(
                f"compiled programs are not kept: {error}; set {VARIABLE} to a folder that can be "
                f"written to, or to {OFF}"
            )
            return None
        if config.jax_compilation_cache_max_size == -1:
            config.update("jax_compilation_cache_max_size", MOST_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    config.update("jax_compilation_cache_dir", str(folder))
    return folder


def may_hang_when_read_back() -> bool:
    """Returns whether programs of this process may have collectives of an XLA:CPU that hangs."""
    devices = jax.devices()
    return len(devices) > 1 and devices[0].platform == "cpu"


def _drop_halves(folder: Path) -> None:
    """Removes what processes that were killed have left.

    JAX writes the time of an entry after the entry. One without it may be cut short, would never be
    written again, and keeps JAX from making room.
    """
    with filelock.FileLock(folder / LOCK, timeout=LOCK_SECONDS):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()
