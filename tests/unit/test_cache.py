"""The caches of programs: in memory, on disk, between processes; what must not be taken for an entry, and what must not
be taken for another."""

import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mpk
from jax_mpk import Options, abi, compiler
from jax_mpk.cache import Disk, Memory
from jax_mpk.device import CPU
from jax_mpk.fingerprint import Unhashable, fingerprint
from jax_mpk.frontend import registry
from jax_mpk.ir import expr as E

X = jnp.arange(32.0).reshape(4, 8)
W = jnp.ones((8, 64))


def trace(f=lambda x, w: jnp.tanh(x @ w) * 2, *args):
    return jax.make_jaxpr(f)(*(args or (X, W)))


def test_the_memory_cache(counted):
    options = Options(cache_dir="")
    a = compiler.program(trace(), CPU, options)
    assert compiler.program(trace(), CPU, options) == a and len(counted) == 1, "equal jaxprs, different objects"
    compiler.program(trace(lambda x, w: jnp.tanh(x @ w) * 2.0000002), CPU, options)
    assert len(counted) == 2
    for n in range(3):
        compiler.program(trace(lambda x, w, n=n: (x @ w) * n), CPU, Options(cache_dir="", cache_entries=2))
    compiler.program(trace(), CPU, options)
    assert len(counted) == 6, "the bound holds: the oldest entry had to go"


def test_the_disk_cache(counted, tmp_path):
    options = Options(cache_dir=str(tmp_path))
    a = compiler.program(trace(), CPU, options, name="f")
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == a
    compiler.clear_cache()
    assert compiler.program(trace(), CPU, options, name="f") == a and len(counted) == 1
    assert compiler.compile(trace(), CPU, options, name="f").stages and len(counted) == 2, "stages are not on disk"
    compiler.clear_cache()
    compiler.program(trace(), CPU, Options(cache_dir=""), name="f")
    assert len(counted) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "version", "key"])
def test_a_damaged_entry_is_built_again(counted, tmp_path, damage):
    options = Options(cache_dir=str(tmp_path))
    a = compiler.program(trace(), CPU, options)
    (file,) = tmp_path.iterdir()
    bad = bytearray(a)
    if damage == "flip":
        bad[len(bad) // 2] ^= 1
    if damage == "version":
        bad[4] += 1
    if damage == "key":  # a whole program of this version, but of nothing that has a key
        p = abi.decode(a)
        bad = abi.encode(p.sections, **p.settings)
    file.write_bytes({"cut": bytes(bad[:-7]), "empty": b""}.get(damage, bytes(bad)))
    compiler.clear_cache()
    assert compiler.program(trace(), CPU, options) == a and len(counted) == 2
    assert file.read_bytes() == a


def test_a_directory_that_cannot_be_used_warns(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.warns(jax_mpk.MegakernelWarning, match="not kept on disk"):
        compiler.program(trace(lambda x, w: x @ w - 3), CPU, Options(cache_dir=str(tmp_path / "file" / "cache")))


def blob(n, size=3000):
    return abi.encode({"Name": np.full(size, n, abi.RECORDS["Name"])}, key=bytes([n]) * 32)


def test_the_disk_cache_is_bounded(tmp_path):
    disk = Disk(tmp_path, 3 * len(blob(0)))
    keys = [bytes([n]) * 32 for n in range(5)]
    for n, key in enumerate(keys):
        disk.put(key, blob(n))
        os.utime(tmp_path / f"{key.hex()}.mpk", (n, n))
        if n == 2:
            assert disk.get(keys[0]) == blob(0)  # used again: not the oldest any more
    assert [disk.get(k) is not None for k in keys] == [True, False, False, True, True]


def test_what_a_killed_process_left_is_removed(tmp_path):
    old, new = tmp_path / ".new-old", tmp_path / ".new-new"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (0, 0))
    Disk(tmp_path, 1 << 20).put(b"k" * 32, blob(0))
    assert not old.exists() and new.exists()


def test_the_memory_cache_forgets_the_least_recent():
    cache = Memory()
    for n in range(3):
        cache.put(bytes([n]), n, 3)
    cache.get(b"\0")
    cache.put(b"\3", 3, 3)
    assert [cache.get(bytes([n])) for n in range(4)] == [0, None, 2, 3]


def test_two_processes_share_a_directory(tmp_path):
    """Many programs under a bound that lets only some live: every process always gets the right program."""
    code = """
        import sys, numpy as np
        from pathlib import Path
        from jax_mpk import abi
        from jax_mpk.cache import Disk
        def blob(n): return abi.encode({"Name": np.full(3000, n, abi.RECORDS["Name"])}, key=bytes([n]) * 32)
        disk = Disk(Path(sys.argv[1]), 4 * len(blob(0)))
        hits = 0
        for i in range(400):
            n = i % 8
            got = disk.get(bytes([n]) * 32)
            hits += got is not None
            assert got is None or got == blob(n)
            disk.put(bytes([n]) * 32, blob(n))
    """
    run = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    procs = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    for p in procs:
        _, err = p.communicate()
        assert p.returncode == 0, err
    assert all(f.suffix == ".mpk" for f in tmp_path.iterdir()), "no temporary file stays"


# ------------------------------------------------------------------------------------------- one for the other


def test_an_entry_under_another_key_is_not_taken(counted, tmp_path):
    """Two functions of the same operands: the whole, undamaged program of one in the place of the other's."""
    options = Options(cache_dir=str(tmp_path))
    one, other = trace(lambda x, w: (x @ w) * 2), trace(lambda x, w: (x @ w) * 3)
    a = compiler.program(one, CPU, options)
    (first,) = tmp_path.iterdir()
    b = compiler.program(other, CPU, options)
    assert len(a) == len(b) and abi.decode(a).key.hex() == first.stem
    second = next(f for f in tmp_path.iterdir() if f != first)
    second.write_bytes(a)
    compiler.clear_cache()
    assert compiler.program(other, CPU, options) == b and len(counted) == 3
    assert second.read_bytes() == b


@pytest.fixture
def scaled():
    """`scaled(k)` traces a multiplication by what a closure returns: a parameter that nobody can write down."""
    p = jc.Primitive("scaled_by_a_closure")
    p.def_abstract_eval(lambda x, scale: x)

    def rule(b, eqn, x):
        by = E.const(float(eqn.params["scale"]()), "f32")
        return b.map(eqn.shape, eqn.dtype, E.binary("mul", x.over(eqn.shape), by))

    registry.RULES[p.name] = rule
    yield lambda k: trace(lambda x: p.bind(x, scale=lambda: k), X)
    del registry.RULES[p.name]


def test_functions_without_a_key_are_kept_apart(scaled, counted, tmp_path):
    options = Options(cache_dir=str(tmp_path))
    with pytest.raises(Unhashable, match="lambda"):
        fingerprint(scaled(2))
    a, b = compiler.program(scaled(2), CPU, options), compiler.program(scaled(3), CPU, options)
    assert a != b and abi.decode(a).key == bytes(32)
    assert compiler.program(scaled(2), CPU, options) == a and len(counted) == 3, "nothing keeps them"
    assert not list(tmp_path.iterdir())
    disk = Disk(tmp_path, 1 << 20)
    disk.put(b"k" * 32, a)
    assert disk.get(b"k" * 32) is None, "no key is not any key"


def test_functions_of_a_module_are_written_down_by_their_name():
    def traced(fn):
        p = jc.Primitive("with_a_function")
        p.def_abstract_eval(lambda x, fn: x)
        return trace(lambda x: p.bind(x, fn=fn), X)

    assert fingerprint(traced(os.path.join)) == fingerprint(traced(os.path.join)) != fingerprint(traced(os.path.split))


# ------------------------------------------------------------------------------------------- what is no entry


def within(seconds, fn):
    """`fn()`, or a failure where it would hang."""
    out = []
    thread = threading.Thread(target=lambda: out.append(fn()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    return out[0]


NO_FILES = {
    "fifo": os.mkfifo,
    "link to a device": lambda file: os.symlink("/dev/zero", file),
    "link to a program": lambda file: os.symlink(file.parent.parent / "program", file),
    "link to itself": lambda file: os.symlink(file, file),
    "dangling link": lambda file: os.symlink("nowhere", file),
    "too large": lambda file: file.touch() or os.truncate(file, 1 << 40),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_files_are_entries(counted, tmp_path, kind):
    folder = tmp_path / "cache"
    options = Options(cache_dir=str(folder))
    a = within(120, lambda: compiler.program(trace(), CPU, options))
    (tmp_path / "program").write_bytes(a)
    (file,) = folder.iterdir()
    file.unlink()
    NO_FILES[kind](file)
    NO_FILES[kind](folder / ("0" * 64 + ".mpk"))  # nobody asks for this one, but the bound counts
    NO_FILES[kind](folder / ".new-left")
    compiler.clear_cache()
    assert within(120, lambda: compiler.program(trace(), CPU, options)) == a and len(counted) == 2
    assert not file.is_symlink() and file.read_bytes() == a
    assert (tmp_path / "program").read_bytes() == a


def test_a_folder_in_the_place_of_an_entry_warns_and_compiles(tmp_path):
    options = Options(cache_dir=str(tmp_path), cache_entries=0)
    a = compiler.program(trace(), CPU, options)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.warns(jax_mpk.MegakernelWarning, match="not kept on disk"):
        assert within(120, lambda: compiler.program(trace(), CPU, options)) == a
    assert [f for f in tmp_path.iterdir() if f != file] == []
