"""The `hide` command, also `python -m hide`: without the extra [hide] one line that says so."""

from __future__ import annotations

import sys

from hide.extra import lacking


def main() -> None:
    """Run the command line; ends the process."""
    try:
        from hide.cli import app

        app()
    except ModuleNotFoundError as error:
        if (reason := lacking(error)) is None:
            raise
        sys.exit(reason)


if __name__ == "__main__":
    main()
