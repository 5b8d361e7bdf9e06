"""Which software a run's results depend on."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ubsmoe.version import __version__


def current_versions() -> dict[str, str]:
    """The versions that results depend on, asked of the installed packages without importing them."""
    versions = {
        "ubsmoe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in ("torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if commit := _commit():
        versions["commit"] = commit
    return versions


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" behind it if files differ; None if it is installed."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
