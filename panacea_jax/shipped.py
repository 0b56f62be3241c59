"""What comes with the package beside its code: recipes, launch scripts, and the page that explains the configuration."""

from pathlib import Path


def shipped(folder: str, installed: str) -> Path:
    """A folder that comes with the package: ``folder`` in a clone, ``installed`` inside the package where a wheel put it."""
    package = Path(__file__).parent
    inside = package / installed
    return inside if inside.is_dir() else package.parent / folder
