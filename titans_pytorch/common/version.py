"""The version of this package, without importing it or torch."""

import importlib.metadata
import platform

__all__ = ["installed", "version_line"]


def installed(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_line() -> str:
    """Return what --version prints: this package, Python and torch."""
    own = installed("titans-pytorch") or "not installed"
    return f"titans_pytorch {own}, Python {platform.python_version()}, torch {installed('torch') or 'not installed'}"
