"""Compile Triton launches for cards that are not there, and read from the machine code what they use.

Triton's own path from arguments to machine code runs, with a driver that names the wanted card instead of asking for
one: what is compiled, and how often, is what a machine with that card would compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Shared memory that a program may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376,
}  # fmt: skip


class KernelLaunch(Protocol):
    """A Triton kernel with the arguments and options of one launch, by name."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses: registers and stack bytes per thread, shared memory per program, instructions."""

    kernel: str
    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    tcgen05: int
    instructions: int


class _Driver:
    """As much of a Triton driver as compiling takes. The capability is also the device, so that caches are apart."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.architecture = 10 * capability[0] + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, Triton compiles for a card of this compute capability; nothing can be launched."""
    from triton.runtime.driver import driver

    previous = driver._active  # `reset_active` would look for a card
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver._active = previous


def compile_launch(launch: KernelLaunch, capability: tuple[int, int]) -> Usage:
    """Compile one launch (tensors may be on the "meta" device) and read its machine code."""
    with target(capability):
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return read_cubin(launch.kernel.__name__, compiled.asm["cubin"], compiled.metadata.shared)


def compilations(launches: Sequence[KernelLaunch], capability: tuple[int, int]) -> int:
    """How many variants these launches leave in Triton's own in-memory caches, without building them."""
    from triton import knobs

    variants = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        variants.add((fn.name, key))
        return True  # "compiled elsewhere": nothing is built

    previous = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with target(capability):
            for launch in launches:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    finally:
        knobs.runtime.jit_cache_hook = previous
    return len(variants)


def read_cubin(name: str, cubin: bytes, shared: int) -> Usage:
    """Registers, stack and tensor-core instructions of the one kernel in `cubin`."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(option: str, file: str) -> str:
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = dump("-res-usage", file.name), dump("-sass", file.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))  # type: ignore[index]
    # An instruction stands after its address in a comment; @P0 and the like before it are predicates.
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return Usage(
        kernel=name,
        registers=registers,
        stack=stack,
        shared=shared,
        mma=sum(opcode.split(".")[0] in ("HMMA", "IMMA", "DMMA") for opcode in opcodes),
        wgmma=sum(opcode.split(".")[0] == "HGMMA" for opcode in opcodes),
        tcgen05=sum(opcode.split(".")[0] == "UTCHMMA" for opcode in opcodes),
        instructions=len(opcodes),
    )
