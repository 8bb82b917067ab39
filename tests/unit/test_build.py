"""Packaging: the stub matches the module, the module needs no CUDA, and everything that a wheel must hold is found."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax_mpk
from jax_mpk import _ext

ROOT = Path(__file__).parents[2]


def test_the_stub_matches_the_module() -> None:
    tree = ast.parse((ROOT / "jax_mpk" / "_ext.pyi").read_text())
    stub = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    module = {n for n in dir(_ext) if not n.startswith("_")}
    assert set(stub) == module
    for name, node in stub.items():
        if isinstance(node, ast.FunctionDef):
            signature = re.match(rf"{name}\((.*)\)", getattr(_ext, name).__doc__ or f"{name}()")
            assert signature, name
            arguments = [a.arg for a in node.args.args + node.args.kwonlyargs]
            assert re.findall(r"(?:^|, )(\w+):", signature[1]) == arguments, name


def test_the_module_needs_no_library_of_cuda_or_xla() -> None:
    needed = subprocess.run(["ldd", _ext.__file__], capture_output=True, text=True)
    if needed.returncode == 0:
        assert not re.search(r"cuda|nvrtc|xla|jaxlib|not found", needed.stdout)


def test_the_module_imports_without_jax() -> None:
    """Loading it must not start a backend: registration is lazy."""
    code = "import sys, importlib.util as u, importlib.machinery as m\n"
    code += f"loader = m.ExtensionFileLoader('jax_mpk._ext', {_ext.__file__!r})\n"
    code += "module = u.module_from_spec(u.spec_from_loader('jax_mpk._ext', loader)); loader.exec_module(module)\n"
    code += "assert 'jax' not in sys.modules and module.info()['threads'] >= 1\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_and_instruction_set_are_options() -> None:
    code = "from jax_mpk import _ext; i = _ext.info(); print(i['threads'], i['isa'])"
    environment = os.environ | {"JAX_MPK_THREADS": "1", "JAX_MPK_ISA": "plain"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.split() == ["1", "plain"]


def test_the_package_holds_what_it_needs() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "jaxlib==0.10.2" in config["build-system"]["requires"], "newer FFI headers do not load on older jaxlibs"
    assert (Path(jax_mpk.__file__).parent / "py.typed").is_file()
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for name in ("ffi/event.h", "cuda/"):
        assert name in cmake and (ROOT / name).exists()
    listed = set(re.findall(r"ffi/cpu/(\w+)\.cc", cmake)) | set(re.findall(r"mpk_isa\((\w+)", cmake))
    listed |= set(re.search(r"foreach\(name ([\w ]+)\)", cmake)[1].split())  # type: ignore[index]
    assert {f.stem for f in (ROOT / "ffi" / "cpu").glob("**/*.cc")} <= listed


def test_ffi_headers_are_of_a_supported_version() -> None:
    """The module loads where the runtime's minor version is at least that of the headers it was built with."""
    assert (0, 3) <= _ext.info()["ffi_version"] <= (0, 5)
