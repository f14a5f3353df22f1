"""The `hide` command."""

from hide.cli.app import app

__all__ = ["app"]
