"""What a user reads when something cannot be done: every gap, the argument by its name, the line that is theirs."""

import functools
import inspect
import pickle
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mpk
from jax_mpk import UnsupportedError, megakernelize
from jax_mpk.errors import Gap

cpu = functools.partial(megakernelize, implementation="cpu")
X = jnp.eye(4) * 2 + 0.25
C = X.astype(jnp.complex64)


def line(fn, n):
    """`file:line (name)` of the n-th line of a function."""
    return f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno + n} ({fn.__code__.co_qualname})"


def many(x):
    jnp.linalg.qr(x)  # nobody uses it, so it is no gap
    a = jax.lax.linalg.cholesky(x)
    b = jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, a)
    c = jnp.fft.fft(b)
    for _ in range(3):
        a = jax.lax.linalg.cholesky(a + 1)
    return a, (c * 2 + 1).real, jax.lax.igamma(x, x)


def test_every_gap_is_named():
    with pytest.raises(UnsupportedError) as e:
        cpu(many)(X)
    gaps = e.value.gaps
    found = [(g.primitive, g.shapes, g.where) for g in gaps]
    assert found == [
        ("cholesky", "float32[4,4]", line(many, 2)),
        ("while", "float32[4,4]", line(many, 3)),
        ("convert_element_type", "float32[4,4]", line(many, 4)),
        ("fft", "complex64[4,4]", line(many, 4)),
        ("cholesky", "float32[4,4]", line(many, 6)),
        ("real", "complex64[4,4]", line(many, 7)),
        ("igamma", "float32[4,4], float32[4,4]", line(many, 7)),
    ], "once a place, and not what follows from another gap (c * 2 + 1)"
    text = str(e.value)
    assert all(f"{p}({s}): " in text and f"\n  at {w}" in text for p, s, w in found)
    assert (e.value.primitive, e.value.where) == (gaps[0].primitive, gaps[0].where)
    with pytest.warns(jax_mpk.MegakernelWarning, match=r"(?s)cholesky.*while.*fft.*igamma"):
        jax.jit(megakernelize(many))(X)


def test_a_long_list_is_cut():
    error = UnsupportedError.of(Gap(f"p{n}", "no rule") for n in range(20))
    assert "p7()" in str(error) and "p8" not in str(error) and str(error).endswith("and 12 more")
    again = pickle.loads(pickle.dumps(error))
    assert again.gaps == error.gaps and str(again) == str(error)
    assert pickle.loads(pickle.dumps(UnsupportedError("sort", "no", "f32[3]", "a:1"))).where == "a:1"


def test_all_side_effects_are_named():
    def f(x):
        jax.debug.print("x {}", x)
        return jax.jit(lambda y: (jax.debug.print("y {}", y), y + 1)[1])(x)

    with pytest.raises(UnsupportedError) as e:
        cpu(f)(X)
    assert [g.where for g in e.value.gaps] == [line(f, 1), line(f, 2).replace("f)", "f.<locals>.<lambda>)")]


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Param(X), nnx.Param(C)])

    def __call__(self, x):
        return x * self.layers[1]


ARGUMENTS = {
    "a leaf of a tree": (lambda: cpu(lambda x, y: x * y["w"][1])(X, {"w": [X, C]}), "args[1]['w'][1]: complex64[4,4]"),
    "by keyword": (lambda: cpu(lambda x, *, y: x * y)(X, y=C), "kwargs['y']: complex64[4,4]"),
    "after a static one": (lambda: cpu(lambda n, x, y: x * y, static_argnums=0)(3, X, C), "args[2]: complex64[4,4]"),
    "batched": (lambda: jax.vmap(cpu(lambda x, y: x * y))(X, C), "args[1]: complex64[4,4]"),
    "of a module": (lambda: cpu(lambda x, net: net(x))(X, Net()), "args[1].layers[1]: complex64[4,4]"),
    "of a module that is called": (lambda: cpu(Net())(X), "self.layers[1]: complex64[4,4]"),
    "of a method": (lambda: cpu(Net().__call__)(X), "self.layers[1]: complex64[4,4]"),
    "in jit": (lambda: jax.jit(cpu(lambda x, y: x * y))(X, C), "args[1]: complex64[4,4]"),
    "under grad": (lambda: jax.grad(lambda x: cpu(lambda x, y: (x * y).real.sum())(x, C))(X), None),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_are_named(kind):
    call, name = ARGUMENTS[kind]
    if name is None:
        with pytest.warns(jax_mpk.MegakernelWarning, match=r"argument\(args\[1\]: complex64"):
            call()
        return
    with pytest.raises(UnsupportedError) as e:
        call()
    gap = e.value.gaps[0]
    assert (gap.primitive, gap.shapes) == ("argument", name)
    assert gap.where.startswith(f"{__file__}:{call.__code__.co_firstlineno} ("), "the line of the call"


def test_captured_arrays_are_named():
    table = np.asarray(C)
    with pytest.raises(UnsupportedError, match=r"captured array\(complex64\[4,4\]\): elements of type complex64"):
        cpu(lambda x: (x * table).real)(X)


def test_what_is_no_array_is_named():
    with pytest.raises(TypeError, match=r"str.*y\['w'\]"):
        cpu(lambda x, y: x)(X, {"w": "text"})


def unsupported(x):
    return jax.lax.linalg.cholesky(x) * 0.75


@pytest.mark.parametrize("call", [
    lambda f: f(X),
    lambda f: jax.jit(f)(X),
    lambda f: jax.jit(lambda x: f(x) + 1).lower(X).compile(),
    lambda f: jax.vmap(f)(X[None]),
])  # fmt: skip
def test_the_warning_is_at_the_callers_line(call, monkeypatch):
    from jax_mpk import primitive

    monkeypatch.setattr(primitive, "_warned", set())
    with pytest.warns(jax_mpk.MegakernelWarning) as seen:
        call(megakernelize(unsupported))
    (w,) = seen
    assert (w.filename, w.lineno) == (__file__, call.__code__.co_firstlineno)


def test_the_warning_can_be_filtered_by_module(monkeypatch):
    from jax_mpk import primitive

    monkeypatch.setattr(primitive, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=jax_mpk.MegakernelWarning, module=__name__)
        megakernelize(unsupported)(X)


def test_a_wrong_option_is_the_users(tmp_path):
    """Also where an unsupported function would run through XLA, and never as a bug of ours."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="stop_after='confuse' is no pass; the passes are lower, simplify"):
        megakernelize(lambda x: x, options={"stop_after": "confuse"})
    with pytest.raises(ValueError, match="cache_dir has a NUL"):
        megakernelize(lambda x: x, options={"cache_dir": "a\0b"})
    with pytest.raises(ValueError, match=r"JAX_MPK_STOP_AFTER='x': .*no pass"):
        jax_mpk.options.from_environment({"JAX_MPK_STOP_AFTER": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(jax_mpk.OptionError, match="option dump: .*file"):
            megakernelize(lambda x: x * 3.5, options={"dump": str(tmp_path / "file")})(X)
        with jax_mpk.override(dump=str(tmp_path / "file")), pytest.raises(jax_mpk.OptionError, match="option dump"):
            jax.jit(megakernelize(lambda x: x * 3.25))(X)


# ------------------------------------------------------------------------------------------- whose line it is

LIBRARY = """
import jax, jax.numpy as jnp
from jax_mpk import megakernelize

def inner(x):
    return jax.lax.linalg.cholesky(x)

def outer(x):
    return inner(x) + 1

@jax.jit
def jitted(x):
    return inner(x) + 1

def apply(f, x):
    return f(x)
"""
APP = """
import fakelib
from jax_mpk import megakernelize

def model(x):
    return fakelib.outer(x) * 2

def main(x):
    return megakernelize(model, implementation="cpu")(x)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A library, and an application that uses it, both installed."""
    folder = tmp_path / "lib" / "site-packages"
    for name, text in (("fakelib", LIBRARY), ("fakeapp", APP)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


def where_in(code, site, *command):
    """The `where` of the error of `code`, run in a process of its own."""
    end = "\nexcept UnsupportedError as e:\n    print(e.where)\n"
    head = "import jax, jax.numpy as jnp, fakelib, fakeapp\nfrom jax_mpk import *\nX = jnp.eye(3)\n"
    text = head + "try:\n" + textwrap.indent(textwrap.dedent(code), "    ") + end
    env = {**jax_mpk.options.os.environ, "PYTHONPATH": f"{site}:{':'.join(sys.path)}"}
    done = subprocess.run([sys.executable, *command, *([text] if "-c" in command else [])], env=env, text=True,
                          input=None if "-c" in command else text, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().replace(str(site) + "/", "")


INSTALLED = {
    "what a library does for the user": ("megakernelize(lambda x: fakelib.outer(x), implementation='cpu')(X)", "<string>:5 (<lambda>)"),
    "what it does in a function of the user": ("fakelib.apply(megakernelize(lambda x: fakelib.outer(x), implementation='cpu'), X)", "<string>:5 (<lambda>)"),
    "its own function, from the user's line": ("megakernelize(fakelib.outer, implementation='cpu')(X)", "<string>:5 (<module>), in fakelib/__init__.py:9 (outer)"),
    "an application of somebody else": ("fakeapp.main(X)", "<string>:5 (<module>), in fakeapp/__init__.py:6 (model)"),
    "its jitted function, traced before by another line": ("""
        fakelib.jitted(X)
        megakernelize(lambda x: fakelib.jitted(x), implementation='cpu')(X)
     """, "<string>:7 (<lambda>)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INSTALLED)
def test_the_users_line_and_not_the_librarys(kind, site):
    code, want = INSTALLED[kind]
    assert where_in(code, site, "-c") == want


def test_a_prompt_is_the_users(site):
    assert (
        where_in("megakernelize(lambda x: fakelib.outer(x), implementation='cpu')(X)", site, "-")
        == "<stdin>:5 (<lambda>)"
    )


def test_where_everything_is_installed_the_wrapped_function_is_named(site):
    """Not the library that it calls, and not the program that called the application."""
    (site / "runner.py").write_text("import jax.numpy as jnp, fakeapp\nfrom jax_mpk import UnsupportedError\n"
                                    "try:\n    fakeapp.main(jnp.eye(3))\nexcept UnsupportedError as e:\n    print(e.where)\n")  # fmt: skip
    assert where_in("", site, "-m", "runner") == "fakeapp/__init__.py:6 (model)"


def test_the_lines_of_this_file():
    source, start = inspect.getsourcelines(unsupported)
    with pytest.raises(UnsupportedError) as e:
        cpu(unsupported)(X)
    assert e.value.where == f"{__file__}:{start + 1} (unsupported)" and len(source) == 2
    with pytest.raises(UnsupportedError) as e:
        jax.vmap(cpu(unsupported))(X[None])
    assert e.value.where == f"{__file__}:{start + 1} (unsupported)"
    with pytest.raises(UnsupportedError) as e:
        cpu(unsupported).lower(X)
    assert e.value.where == f"{__file__}:{start + 1} (unsupported)"
