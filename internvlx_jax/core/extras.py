"""Optional packages: imported where they are used, and named with their extra when missing."""

from __future__ import annotations

import importlib
from typing import Any

from internvlx_jax.core.errors import ConfigError


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Imports a package that only an extra installs.

    Args:
        module: full name of the module, such as "pyarrow.parquet".
        extra: the extra of internvlx-jax that installs it, such as "eval".
        purpose: what needs it, as the beginning of a sentence, such as "reading parquet files".

    Returns:
        The module that `module` names, not its top-level package.

    Raises:
        ConfigError: the package is not installed; the message names the command that installs it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ConfigError(
            f"{purpose} needs {package}, which is not installed; "
            f"pip install 'internvlx-jax[{extra}]'"
        ) from error
