"""Imports point one way, in functions too: from what people touch down to the operators; no circle anywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest floor up. A module imports from its own floor and from those below.
FLOORS = [
    ["hide_kernels"],
    ["hide.texts", "hide.tags", "hide.replies", "hide.questions", "hide.output", "hide.extra", "hide.upstream"],
    ["hide.images"],
    ["hide.models"],
    ["hide.presets"],
    ["hide.engine"],
    ["hide.session", "hide.session_pool"],
    ["hide.methods"],
    ["hide.present"],
    ["hide.tiny", "hide.drop_in"],
    ["hide.evaluation", "hide.profiling", "hide.training", "hide.serve"],
    ["hide.cli", "hide.doctor", "hide.__main__"],
]
OPERATORS = ["attention_rows", "attention_received", "token_maps", "regions", "collage", "pixel_values"]
# What an operator's implementations may share: what is asked, how kernels are chosen, and per-element arithmetic.
IMPLEMENTATIONS = ("reference", "torch_blocked", "triton_launch", "cupy", "compiled", "scipy", "ndimage")


def modules():
    found = {}
    for top in ("hide", "hide_kernels"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def module_of(name):
    """The module that a dotted name is in, or `None` for other packages."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports(name):
    """(module, only for type checkers) of every import of ours in a module, wherever it stands."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            wanted = [".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for one in map(module_of, wanted):
            if one is not None and one != name:
                yield one, id(node) in typing


def floor(name):
    return next(
        (i for i, floor in enumerate(FLOORS) for one in floor if name == one or name.startswith(f"{one}.")), None
    )


def test_every_module_has_a_floor_and_imports_from_it_or_from_below():
    assert len(MODULES) > 100
    homeless = [name for name in MODULES if name != "hide" and floor(name) is None]
    assert not homeless, f"say in FLOORS where they stand: {homeless}"
    climbing = [
        f"{name} -> {other}" for name in MODULES for other, _ in imports(name)
        if "hide" not in (name, other) and floor(other) > floor(name)
    ]  # fmt: skip
    assert not climbing


def test_there_is_no_circle():
    arrows = {name: {other for other, typing in imports(name) if not typing and other != "hide"} for name in MODULES}
    state, path = {}, []

    def visit(name):
        state[name] = "open"
        path.append(name)
        for other in arrows[name]:
            assert state.get(other) != "open", " -> ".join([*path[path.index(other) :], other])
            if other not in state:
                visit(other)
        path.pop()
        state[name] = "done"

    for name in arrows:
        if name not in state:
            visit(name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_implementations_of_an_operator_know_neither_each_other_nor_its_door(operator):
    home = f"hide_kernels.{operator}"
    own = [name for name in MODULES if name.startswith(f"{home}.") and name.rpartition(".")[2] in IMPLEMENTATIONS]
    assert own, "what are its implementations called?"
    for name in own:
        for other, _ in imports(name):
            assert other not in (home, f"{home}.api", f"{home}.dispatch"), f"{name} -> {other}"
            assert other not in own, f"{name} -> {other}"


def test_the_operators_name_nothing_above_them():
    for name, path in MODULES.items():
        if name.startswith("hide_kernels"):
            for other, _ in imports(name):
                assert not other.startswith("hide."), f"{name} -> {other}"
            frameworks = {"transformers", "vllm"} & {
                alias.name.partition(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) and not node.level else node.names)
            }  # fmt: skip
            assert not frameworks or ".integrations" in name, f"{name} knows {frameworks}"
