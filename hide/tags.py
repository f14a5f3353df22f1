"""The tags that a model is asked to put its last word between, and what stands there."""

from __future__ import annotations

import re

OPEN_TAG, CLOSE_TAG = "<FINAL_OUTPUT>", "</FINAL_OUTPUT>"

_TAG = re.compile(f"<(/?){re.escape(OPEN_TAG[1:])}", re.IGNORECASE)


def tagged(text: str) -> str | None:
    """What stands behind the last opening tag that has a word behind it, up to the next tag or the end.

    Empty where no opening tag has one, `None` without an opening tag.
    """
    # Text before the first tag, then "" or "/" of each tag and the text behind it.
    pieces = _TAG.split(text)
    bodies = [body for slash, body in zip(pieces[1::2], pieces[2::2], strict=True) if not slash]
    if not bodies:
        return None
    return next((body for body in reversed(bodies) if re.search(r"\w", body)), "")


def without_tags(text: str) -> str:
    """`text` with its tags taken out."""
    return _TAG.sub("", text)
