"""Imports of optional packages: where they are used, with the remedy in the error."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, feature: str = "this feature") -> Any:
    """Import an optional module, or say which extra brings it.

    Args:
        module: dotted name, such as "matplotlib.figure".
        extra: the extra of `ppo-fast` that installs it, such as "train".
        feature: what needs it, in the words of the caller's user.

    Raises:
        ImportError: the module is missing, or is there and fails to import; the cause is chained.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (package, module)
        broken = "" if missing else f", which is installed but does not import ({error})"
        raise ImportError(
            f"{feature} needs {package}{broken}; install it with pip install 'ppo-fast[{extra}]'",
            name=package,
        ) from error
