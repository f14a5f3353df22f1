"""Which implementation of an operator runs where, and why.

A backend is a name and a predicate: given the arguments of a call it returns the reason why it cannot serve them, or
`None`. Predicates are pure: they look at types, shapes, devices and installed packages, never run anything, and never
raise. An explicit `backend=` is honoured or refused; without one the first backend that can serve the call runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

Predicate = Callable[[Mapping[str, Any]], "str | None"]

# CUDA's limit on two of a grid's three dimensions.
MAX_GRID = 65_535
# Queries of the first pass in one program, where there are many.
SMALLEST_TILE = 32


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `refuses(arguments)` returns why this backend cannot serve a call with these keyword arguments, or `None`.
    """

    name: str
    summary: str
    refuses: Predicate


def _needs(module: str) -> Predicate:
    def refuses(arguments: Mapping[str, Any]) -> str | None:
        return None if find_spec(module) else f"{module} is not installed"

    return refuses


def _unquantised_rows(arguments: Mapping[str, Any]) -> str | None:
    for name in ("query", "key"):
        dtype = str(getattr(arguments.get(name), "dtype", "")).removeprefix("torch.")
        if dtype.startswith(("float8", "float4", "int", "uint")):
            return f"quantised tensors ({name} is {dtype}) are not served; dequantise to 16 bits"
    return None


# Triton's own interpreter does not, that of `testing.interpreter` does.
INTERPRETS_BFLOAT16 = False


def _triton_rows(arguments: Mapping[str, Any]) -> str | None:
    query = arguments.get("query")
    refused = _unquantised_rows(arguments) or _no_triton(query, "query")
    return refused or (None if query is None else _not_tiled(arguments))


def _triton_received(arguments: Mapping[str, Any]) -> str | None:
    query: Any = arguments.get("query")
    dense = query is not None and len(query.shape) == 4
    # No chunks of rows: those of a dense sample are the most of any, as a packed batch says.
    rows = query.shape[2] if dense else arguments.get("max_seqlen_q")
    refused = _triton_rows({**arguments, "max_seqlen_q": rows})
    if refused is None and dense and math.prod(query.shape[:3]) >= 1 << 31:
        return "2 ** 31 rows of all heads and more are not served"
    return refused


def _no_triton(tensor: Any, argument: str) -> str | None:
    """Why Triton cannot run where `tensor` is, or on this machine where there is none."""
    device = getattr(tensor, "device", None)
    if device is not None and device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"{argument} is on the CPU; the kernels need a CUDA device (or TRITON_INTERPRET=1, to test them)"
        if str(tensor.dtype) == "torch.bfloat16" and not INTERPRETS_BFLOAT16:
            return "Triton's interpreter multiplies bfloat16 as bit patterns"
        return _needs("triton")({})
    if device is not None and device.type != "cuda":
        return f"{argument} is on {device}; the kernels need a CUDA device"
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is seen"
    if torch.version.hip is not None:
        return "ROCm is not served"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"sm_{major}{minor} is older than sm_80, which the kernels need"
    return _needs("triton")({})


def _not_tiled(arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels have no tile for such tensors."""
    query, key, bounds = arguments["query"], arguments.get("key"), arguments.get("cu_seqlens_q")
    dtype, depth = str(query.dtype).removeprefix("torch."), query.shape[-1]
    if dtype not in ("float16", "bfloat16", "float32"):
        return f"{dtype} is not served; float16, bfloat16 and float32 are"
    if not 32 <= depth <= 256 or depth % 8:
        return f"head size {depth} is not served; multiples of 8 from 32 to 256 are"
    samples = query.shape[0] if bounds is None else bounds.shape[0] - 1
    if samples * query.shape[1] > MAX_GRID:
        return f"{samples} samples of {query.shape[1]} heads are more than {MAX_GRID} programs"
    if bounds is not None and query.shape[0] * query.shape[1] >= 1 << 31:
        return "2 ** 31 packed rows of all heads and more are not served"
    if key is None:
        return None
    table, most_rows = arguments.get("block_table"), arguments.get("max_seqlen_q") or 0
    group = query.shape[1] // max(1, key.shape[1 if table is None else 2])
    if most_rows * group > MAX_GRID * SMALLEST_TILE:
        return f"max_seqlen_q {most_rows} in groups of {group} heads is more than {MAX_GRID} tiles of rows"
    if table is not None:
        size = key.shape[1]
        if size & (size - 1):
            return f"pages of {size} keys are not served; powers of two are"
        keys = table.shape[1] * size
    else:
        keys = max(key.shape[0 if len(key.shape) == 3 else 2], arguments.get("max_seqlen_k") or 0)
    if max(keys, *query.shape[2:-1], 0) >= 1 << 30:
        return "2 ** 30 keys or rows and more are not served"
    return None


def _launches(device: str, argument: str) -> Predicate:
    """The compiled kernels, for calls whose `argument` lies on `device` ("cpu" or "cuda")."""

    def refuses(arguments: Mapping[str, Any]) -> str | None:
        try:
            from .native import missing
        except ImportError as error:
            return f"{error.name} is not installed"
        return _elsewhere(device, arguments.get(argument), argument) or missing(device)

    return refuses


def _elsewhere(device: str, tensor: Any, argument: str) -> str | None:
    """Why a call is none for `device`; without a tensor to look at, whether there is such a device at all."""
    if tensor is not None:
        return None if tensor.device.type == device else f"{argument} is on {tensor.device}"
    if device == "cuda":
        import torch

        return None if torch.cuda.is_available() else "there is no CUDA device"
    return None


def _int32_cells(refuses: Predicate, dims: int) -> Predicate:
    """Cells of the last `dims` dimensions of `maps` are counted in 32 bits."""

    def also_refuses(arguments: Mapping[str, Any]) -> str | None:
        maps = arguments.get("maps")
        if maps is not None and maps.shape[-dims:].numel() >= 2**31:
            return f"maps of {tuple(maps.shape)} have too many cells for 32-bit indices"
        return refuses(arguments)

    return also_refuses


def _cupy_labels(arguments: Mapping[str, Any]) -> str | None:
    return _elsewhere("cuda", arguments.get("maps"), "maps") or _needs("cupy")(arguments)


def _pillow(arguments: Mapping[str, Any]) -> str | None:
    return _needs("PIL")(arguments) or _needs("numpy")(arguments)


def _triton_maps(arguments: Mapping[str, Any]) -> str | None:
    cells = sum(image.numel() for image in arguments.get("rows", ()))
    if cells >= 2**31:
        return f"{cells} cells of all rows are too many for 32-bit indices"
    return _no_triton(_first_rows(arguments), "rows")


def _first_rows(arguments: Mapping[str, Any]) -> Any:
    return next(iter(arguments.get("rows", ())), None)


def _cupy_maps(*modules: str) -> Predicate:
    """Smoothing on a CUDA device by a library made of `modules`."""

    def refuses(arguments: Mapping[str, Any]) -> str | None:
        missing = next((reason for module in modules if (reason := _needs(module)(arguments))), None)
        return _elsewhere("cuda", _first_rows(arguments), "rows") or missing

    return refuses


# Order is preference; the last entry of each operator is its reference, the definition that the others are held to.
OPERATORS: dict[str, tuple[Backend, ...]] = {
    "attention_rows": (
        Backend("triton", "fused kernels for CUDA devices from sm_80 on", _triton_rows),
        Backend("torch", "plain PyTorch on any device, in a buffer of fixed size", _unquantised_rows),
    ),
    "attention_received": (
        Backend("triton", "fused kernels for CUDA devices from sm_80 on", _triton_received),
        Backend("torch", "plain PyTorch on any device, in a buffer of a few rows", _unquantised_rows),
    ),
    # Reasoned from launches and passes over memory, not measured.
    "token_maps": (
        Backend("triton", "four fused kernels in float64, no synchronisation", _triton_maps),
        Backend("cupy", "CuPy's Gaussian, image by image", _cupy_maps("cupy")),
        Backend("cucim", "cuCIM's Gaussian, image by image", _cupy_maps("cupy", "cucim")),
        Backend("scipy", "SciPy in float64 on the CPU", _needs("scipy")),
    ),
    "regions": (
        Backend("cuda", "one thread block per map, one launch", _int32_cells(_launches("cuda", "maps"), 2)),
        Backend("cupy", "CuPy labelling, one call for the whole batch", _int32_cells(_cupy_labels, 3)),
        Backend("cpp", "the same kernels as C++ on one core", _int32_cells(_launches("cpu", "maps"), 2)),
        Backend("scipy", "SciPy labelling on the CPU, one call for the whole batch", _needs("scipy")),
    ),
    "collage": (
        Backend("cuda", "boxes, layout and pixels on the device, one read by the host", _launches("cuda", "image")),
        Backend("cpp", "the same kernels as C++ on one core", _launches("cpu", "image")),
        Backend("numpy", "NumPy slices on the CPU", _needs("numpy")),
    ),
    "pixel_values": (
        Backend("cuda", "resize and patches on the device, two launches", _launches("cuda", "image")),
        Backend("cpp", "the same kernels as C++ on one core", _launches("cpu", "image")),
        Backend("pillow", "Pillow and NumPy on the CPU", _pillow),
    ),
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the chosen backend (or `None`) and each candidate with its reason for refusing, if any."""

    operator: str
    chosen: str | None
    candidates: tuple[tuple[Backend, str | None], ...]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'no backend can serve this call'}"]
        for candidate, reason in self.candidates:
            verdict = reason or ("runs" if candidate.name == self.chosen else "could run")
            lines.append(f"  {candidate.name:<8} {verdict} ({candidate.summary})")
        return "\n".join(lines)


def explain(operator: str, **arguments: Any) -> Explanation:
    """Say which backend `operator` would use for a call with `arguments` (its own keyword names), and why.

    Nothing is computed. Raises `ValueError` for an operator that does not exist.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}, want one of {sorted(OPERATORS)}")
    candidates = tuple((backend, backend.refuses(arguments)) for backend in OPERATORS[operator])
    chosen = next((backend.name for backend, reason in candidates if reason is None), None)
    return Explanation(operator, chosen, candidates)


def resolve(operator: str, backend: str | None, **arguments: Any) -> str:
    """Name of the backend that serves the call. Raises `ValueError` with every reason when none does.

    A named `backend` never falls back to another one.
    """
    explanation = explain(operator, **arguments)
    if backend is None:
        if explanation.chosen is None:
            raise ValueError(str(explanation))
        return explanation.chosen
    reasons = {candidate.name: reason for candidate, reason in explanation.candidates}
    if backend not in reasons:
        raise ValueError(f"backend: got {backend!r}, want None or one of {list(reasons)} for {operator}")
    if reasons[backend] is not None:
        raise ValueError(f"backend {backend!r} cannot serve this call of {operator}: {reasons[backend]}")
    return backend
