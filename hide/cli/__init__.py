"""The `hide` command."""

from hide.cli.main import app

__all__ = ["app"]
