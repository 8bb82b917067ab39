"""The structure of the package: imports go one way, and nothing goes round."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_mpk

ROOT = Path(jax_mpk.__file__).parent
MODULES = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p
           for p in sorted(ROOT.rglob("*.py"))}  # fmt: skip

# What a package may import when it is loaded, besides itself. Kinds print with the printers of backends/cuda.
MAY = {
    "abi": set(),
    "errors": set(),
    "device": {"abi"},
    "ir": {"abi", "errors"},
    "kinds": {"abi", "backends", "device", "errors", "ir"},
    "verify": {"abi", "device", "errors", "ir"},
    "passes": {"abi", "device", "errors", "ir", "kinds"},
    "frontend": {"_compat", "abi", "errors", "ir", "passes"},
}


def _statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is loaded: not those of functions, nor of type checking."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _imports(path: Path) -> set[str]:
    out = set()
    for node in _statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif node.module:
            out |= {x if (x := f"{node.module}.{a.name}") in MODULES else node.module for a in node.names}
    return {x for x in out if x in MODULES}


GRAPH = {name: _imports(path) - {name} for name, path in MODULES.items()}


def test_no_circles():
    try:
        tuple(graphlib.TopologicalSorter(GRAPH).static_order())
    except graphlib.CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


@pytest.mark.parametrize("package", MAY)
def test_no_upward_arrows(package):
    part = lambda name: name.split(".")[1] if "." in name else ""  # noqa: E731
    found = [(a, b) for a, into in GRAPH.items() for b in into
             if part(a) == package and part(b) != package and part(b) not in MAY[package]]  # fmt: skip
    assert not found, "upward"
    assert any(part(a) == package for a in GRAPH)


def test_kinds_print_and_no_more():
    """Of the back ends they know the printers of CUDA, none of which knows a kind, only what one is bound to."""
    known = lambda names: {x for x in names if x.startswith("jax_mpk.backends")}  # noqa: E731
    below = {b for a, into in GRAPH.items() if a.startswith("jax_mpk.kinds") for b in known(into)}
    while new := {c for b in below for c in known(GRAPH[b])} - below:
        below |= new
    into = {c for b in below for c in GRAPH[b]} - {"jax_mpk.kinds.bound", "jax_mpk.kinds.variant"}
    assert below and not any(c.startswith(("jax_mpk.kinds", "jax_mpk.passes", "jax_mpk.compiler")) for c in into)


def test_no_mutable_defaults():
    bad = []
    for path in MODULES.values():
        for f in ast.walk(ast.parse(path.read_text())):
            if isinstance(f, ast.FunctionDef | ast.Lambda):
                for d in (*f.args.defaults, *f.args.kw_defaults):
                    if isinstance(d, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
                        bad.append(f"{path}:{d.lineno}")
    assert not bad
