# SPDX-License-Identifier: BSD-3-Clause
"""opacus and dp_accounting, where they are installed: both belong to the extra ``privacy``."""

import importlib
from typing import Any

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["import_extra"]


def import_extra(module: str, what: str) -> Any:
    """Import a module of the extra when it is needed, not before: it takes long.

    Args:
        module: Its name.
        what: Needs it.

    Returns:
        The module.

    Raises:
        ConfigError: It is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{what}: needs {package}, which cannot be imported ({error}). Run: pip install "
            "torchrec-scratchpipe[privacy]"
        ) from error
