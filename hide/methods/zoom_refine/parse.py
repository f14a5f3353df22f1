"""What Zoom-Refine reads in a reply: an answer, a box, a rechecked answer; soundly, and as the published code does.

Published rules are those of the released code for local models (arXiv 2506.01663), quirks included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from hide.replies import read_letter

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in parts of the width and height, 0 <= x1 < x2 <= 1 and so for y."""

_COLON = r"\s*[:：]\s*"
_HEADER = re.compile(rf"(rechecked\s+)?\banswer\W{{0,4}}?{_COLON}[^\S\n]*([^\n]*)", re.IGNORECASE)
# No two ways to read a run of blanks or digits: a reply that repeats itself would take hours.
_NUMBER, _BETWEEN = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:\s?%)?", r"(?:\s*[,;]\s*|\s+)"
_FOUR = re.compile(_BETWEEN.join([f"({_NUMBER})"] * 4))
_BRACKETED = re.compile(rf"[\[(]{{1,2}}\s*{_BETWEEN.join([_NUMBER] * 4)}\s*[\])]")
_BOX_HEADER = re.compile(r"(?:bounding[\s_-]*box|bbox(?:_2d)?)", re.IGNORECASE)


class Found(NamedTuple):
    """An answer of a reply: text, and the letter that it is or names."""

    text: str
    letter: str | None


def answer_in(reply: str, options: Sequence[str], *, rechecked: bool = False) -> Found | None:
    """What stands behind the last "Answer:" (`rechecked`: "Rechecked Answer:"), whatever is bold or bracketed.

    options: the question's, as `read_letter` takes them; with them, a line that names none does not count.
    """
    for header in reversed(list(_HEADER.finditer(reply))):
        if bool(header[1]) != rechecked:
            continue
        text = header[2].strip().strip("*").strip()
        text = text[1:-1].strip() if text[:1] in "[(" and text[-1:] in "])" else text
        letter = read_letter(text, options) if options else None
        if text and (letter is not None or not options):
            return Found(text, letter)
    return None


def box_in(reply: str, extent: tuple[int, int] | None = None) -> Box | None:
    """The last box of a reply: four numbers behind "Bounding box" or "bbox", or else any four in brackets.

    Numbers up to 2, and percentages, are parts of the width and height: no box in other units is that small. Larger
    ones are in units of which `extent` has so many across and down, as the model's family writes them; `None`: it
    writes none, and there is no box. Corners may come in any order and lie outside, where they are clamped; a box
    without an area is none.
    """
    for place in reversed(list(_BOX_HEADER.finditer(reply))):
        numbers = _FOUR.search(reply, place.end(), place.end() + 200)
        if numbers is None or numbers.start() > place.end() + 120:
            continue  # more than a few words and signs in between
        if (box := _box(numbers.groups(), extent)) is not None:
            return box
    for numbers in reversed(list(_BRACKETED.finditer(reply))):
        four = _FOUR.search(numbers[0])
        if four is not None and (box := _box(four.groups(), extent)) is not None:
            return box
    return None


def _box(texts: Sequence[str], extent: tuple[int, int] | None) -> Box | None:
    percent = any("%" in text for text in texts)
    values = [float(text.replace("%", "")) / (100 if percent else 1) for text in texts]
    if max(map(abs, values)) > 2 and not percent:
        if extent is None:
            return None
        values = [value / extent[axis % 2] for axis, value in enumerate(values)]
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in values)
    box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    return box if box[0] < box[2] and box[1] < box[3] else None


# -- as published -----------------------------------------------------------------------------------------------------

_PUBLISHED_HEADER = r"answer\s*(?:\*\*\s*)?[:：]\s*"
_PUBLISHED_BRACKETED = re.compile(_PUBLISHED_HEADER + r"[\[(]\s*([A-E])\s*[\])]", re.IGNORECASE)
_PUBLISHED_BARE = re.compile(_PUBLISHED_HEADER + r"\b([A-E])\b", re.IGNORECASE)
_PUBLISHED_RECHECKED = re.compile(rf"rechecked\s+{_PUBLISHED_HEADER}(?:[\[(]\s*)?([A-E])", re.IGNORECASE)
_DECIMAL = r"(\d+(?:\.\d+)?)"
_PUBLISHED_BOX = re.compile(
    r"(?:bounding box|bbox)(?:\s*\*\*)?(?:\s*:)?(?:\s*\*\*)?\s*"
    rf"\[\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*\]",
    re.IGNORECASE,
)


def published_letter(reply: str) -> str | None:
    """The first letter in brackets behind any header, a rechecked answer's too; else the first bare one."""
    found = _PUBLISHED_BRACKETED.search(reply) or _PUBLISHED_BARE.search(reply)
    return found[1].upper() if found else None


def published_first_letter(reply: str) -> str | None:
    """Of a plain answer: the first letter from A to E anywhere in it, in either case, though it stands in a word."""
    found = re.search("[a-e]", reply, re.IGNORECASE)
    return found[0].upper() if found else None


def published_rechecked(reply: str) -> str | None:
    """The first letter behind "Rechecked Answer:", though it begins a word."""
    found = _PUBLISHED_RECHECKED.search(reply)
    return found[1].upper() if found else None


def published_box(reply: str) -> Box | None:
    """The last box in square brackets; corners must be in order before they are clamped to the image."""
    found = list(_PUBLISHED_BOX.finditer(reply))
    if not found:
        return None
    x1, y1, x2, y2 = map(float, found[-1].groups())
    if not (x1 < x2 and y1 < y2):
        return None
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
    # A side that clamping has closed is opened again where there is room.
    x2, y2 = (min(1.0, first + 1e-6) if last <= first else last for first, last in ((x1, x2), (y1, y2)))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
