"""Running out of memory as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hide.texts import one_line


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, PyTorch's CPU allocator or that of pinned memory had no memory left."""
    said = ("you tried to allocate", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def advice(what: str, error: BaseException) -> MemoryError:
    """The error to raise in place of `error`."""
    return MemoryError(
        f"{what} do not fit into memory ({one_line(str(error), 200)}); lower max_tokens, use fewer or smaller images, "
        "a smaller dtype, or close other sessions"
    )


@contextmanager
def advised(what: str) -> Iterator[None]:
    """Inside, running out of memory is a `MemoryError` that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise advice(what, error) from None
