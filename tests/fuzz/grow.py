"""Random functions of 3 to 25 operations, from a seed.

Every family of operations writes a line of Python over the variables there are, or gives up; the line is kept if JAX
accepts it and the result is not too large. Bits of inexact values depend on the order of sums and on the library, so
what would make them a choice (a comparison, an index, a rounding to integers) takes exact values only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from tests.fuzz import windows
from tests.fuzz.case import FLOATS, INTEGERS, NAMES, Case, Line, Operand, names, numpy_dtype, tidy

SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 11, 13, 16, 17, 31, 32, 33, 40, 64)
ELEMENTS, LARGE = 3000, 90_000
"""Elements of a variable, usually and now and then."""


@dataclass
class Grower:
    r: np.random.Generator
    seed: int
    operands: list[Operand] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    limit: int = ELEMENTS

    # ---------------------------------------------------------------------------------------------------------- choices

    def one(self, *xs: object) -> object:
        return xs[int(self.r.integers(len(xs)))]

    def chance(self, p: float) -> bool:
        return bool(self.r.random() < p)

    def up_to(self, n: int, low: int = 0) -> int:
        """low .. n, both included."""
        return int(self.r.integers(low, n + 1))

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        rank = int(self.r.choice(5, p=[0.05, 0.25, 0.4, 0.2, 0.1])) if rank is None else rank
        while True:
            shape = tuple(int(self.r.choice(SIZES)) for _ in range(rank))
            if math.prod(shape) <= self.limit:
                return shape

    def variables(self) -> list[Line]:
        given = [Line(o.name, "", True, o.dtype, o.shape) for o in self.operands]
        return [*given, *self.lines]

    def pick(self, *dtypes: str, exact: bool = False, rank: int = 0) -> Line | None:
        """A variable, late ones preferred."""
        fits = [v for v in self.variables() if (not dtypes or v.dtype in dtypes) and (v.exact or not exact)
                and len(v.shape) >= rank]  # fmt: skip
        if not fits:
            return None
        return fits[min(len(fits) - 1, int(len(fits) * math.sqrt(self.r.random())))]

    def operand(self, shape: tuple[int, ...], dtype: str, kind: str = "", limit: int = 0) -> Line:
        if not kind:
            p = self.r.random()
            kind = "normal" if dtype in FLOATS else "small"
            kind = "wide" if p < 0.3 and dtype in INTEGERS else "special" if p < 0.08 and dtype in FLOATS else kind
        o = Operand(f"a{len(self.operands)}", shape, dtype, kind, self.up_to(1 << 30), limit)
        self.operands.append(o)
        return Line(o.name, "", True, dtype, shape)

    def dtype(self) -> str:
        return str(self.r.choice(["float32", "bfloat16", "float16", *INTEGERS, "bool"],
                                 p=[0.45, 0.12, 0.04, 0.12, 0.05, 0.04, 0.04, 0.03, 0.03, 0.08]))  # fmt: skip

    def axis(self, v: Line) -> int:
        return self.up_to(len(v.shape) - 1)

    # ------------------------------------------------------------------------------------------------------------ lines

    def add(self, text: str, exact: bool) -> bool:
        """Keeps the line if JAX takes it."""
        scope = {v.name: jax.ShapeDtypeStruct(v.shape, numpy_dtype(v.dtype)) for v in self.variables()}
        read = [n for n in dict.fromkeys(names(text)) if n in scope]

        def f(*args: object) -> object:
            return eval(text, {**NAMES, **dict(zip(read, args, strict=True))})

        try:
            out = jax.eval_shape(f, *(scope[n] for n in read))
        except (TypeError, ValueError, IndexError, NotImplementedError, OverflowError, ZeroDivisionError):
            return False
        name = str(getattr(out, "dtype", ""))
        if name not in (*FLOATS, *INTEGERS, "bool") or not 0 < math.prod(out.shape) <= max(self.limit, ELEMENTS) * 4:
            return False
        self.lines.append(Line(f"v{len(self.lines)}", text, exact, name, tuple(out.shape)))
        return True

    def case(self) -> Case:
        self.limit = LARGE if self.chance(0.03) else 200 if self.chance(0.3) else ELEMENTS
        for _ in range(self.up_to(3, 1)):
            self.operand(self.shape(), self.dtype())
        if self.chance(0.9):
            self.operand(self.shape(2), "float32", "normal")
        wanted, tries = self.up_to(25, 3) if self.chance(0.4) else self.up_to(8, 3), 0
        families = list(FAMILIES)
        weights = np.array([FAMILIES[f] for f in families], float)
        while len(self.lines) < wanted and tries < 200:
            tries += 1
            families[int(self.r.choice(len(families), p=weights / weights.sum()))](self)
        transform = str(self.r.choice(["", "vmap", "grad", "donate"], p=[0.7, 0.12, 0.1, 0.08]))
        used = {n for x in self.lines for n in names(x.text)}
        ends = [x.name for x in self.lines if x.name not in used]
        outputs = list(dict.fromkeys([self.lines[-1].name, *ends[-2:]]))
        if self.chance(0.15):
            outputs.append(self.pick().name)
        if self.chance(0.3):
            outputs.insert(0, self.lines[self.up_to(len(self.lines) - 1)].name)
        case = tidy(Case(self.seed, tuple(self.operands), tuple(self.lines), tuple(dict.fromkeys(outputs)), transform))
        real = any(o.dtype in FLOATS for o in case.operands)
        return case if case.operands and (real or transform != "grad") else replace(case, transform="")


def grow(seed: int) -> Case:
    """The case of a seed: the same in every process."""
    return Grower(np.random.default_rng(seed), seed).case()


# ------------------------------------------------------------------------------------------------------------ families


def _factors(g: Grower, n: int) -> tuple[int, ...]:
    out = []
    while n > 1 and len(out) < 4:
        d = g.one(*[d for d in range(2, min(n, 64) + 1) if n % d == 0], n)
        out.append(d)
        n //= d
    out = [*out, n] if n > 1 else out
    if g.chance(0.15):
        out.insert(g.up_to(len(out)), 1)
    return tuple(int(x) for x in out)


def move(g: Grower) -> None:
    """The elements stay, their places change."""
    v = g.pick(rank=1)
    if v is None:
        return
    n, d, rank = v.name, g.axis(v), len(v.shape)
    size = v.shape[d]
    a, z = sorted((g.up_to(size), g.up_to(size)))
    slices = ", ".join([":"] * d + [f"{a}:{z}:{g.up_to(3, 1)}"])
    back = ", ".join([":"] * d + [f"::-{g.up_to(2, 1)}"])
    pads = ", ".join(f"({g.up_to(3) - 1}, {g.up_to(3) - 1}, {g.up_to(2) if g.chance(0.4) else 0})" for _ in range(rank))
    zero = f"jnp.zeros((), {n}.dtype)" if g.chance(0.5) else f"{n}.ravel()[0]"
    repeats = [1] * rank
    repeats[d] = g.up_to(3, 2)
    wide = list(v.shape)
    wide.insert(g.up_to(rank), g.up_to(4, 1))
    text = g.one(
        f"{n}.transpose({tuple(int(x) for x in g.r.permutation(rank))})",
        f"{n}.reshape({_factors(g, math.prod(v.shape))})",
        f"jnp.repeat({n}, {g.up_to(4, 2)}, {d})",
        f"jnp.tile({n}, {tuple(repeats)})",
        f"jnp.flip({n}, {d})",
        f"{n}[{slices}]",
        f"{n}[{back}]",
        f"jnp.roll({n}, {g.up_to(size) - size // 2}, {d})",
        f"lax.pad({n}, {zero}, ({pads},))",
        f"jnp.concatenate([{n}, {n}[{', '.join([':'] * d + [f'{a}:'])}]], {d})",
        f"jnp.stack([{n}, {n}], {g.up_to(rank)})",
        f"jnp.expand_dims({n}, {g.up_to(rank)})",
        f"jnp.broadcast_to({n}[..., None], {(*v.shape, g.up_to(4, 2))})",
        f"jnp.pad({n}, {g.up_to(2)}, mode={str(g.one('edge', 'reflect', 'wrap', 'symmetric'))!r})",
        f"jnp.split({n}, {max(1, size)}, {d})[{g.up_to(max(0, size - 1))}]",
        f"jnp.tril({n})",
        f"jnp.swapaxes({n}, 0, {d})",
        f"jnp.atleast_2d({n}).diagonal()",
    )
    g.add(str(text), v.exact)


def join(g: Grower) -> None:
    """Pieces of several variables."""
    v = g.pick(rank=1)
    if v is None:
        return
    d = g.axis(v)
    others = [w for w in g.variables() if w.dtype == v.dtype and len(w.shape) == len(v.shape)
              and all(m == n for k, (m, n) in enumerate(zip(v.shape, w.shape, strict=True)) if k != d)]  # fmt: skip
    parts = [others[g.up_to(len(others) - 1)] for _ in range(g.up_to(3, 2))]
    g.add(f"jnp.concatenate([{', '.join(p.name for p in parts)}], {d})", all(p.exact for p in parts))


UNARY = ("jnp.exp(jnp.clip({}, -9, 9))", "jnp.tanh({})", "jax.nn.silu({})", "jax.nn.gelu({})", "jax.nn.sigmoid({})", "jnp.sin({})",
         "jnp.cos({})", "lax.rsqrt({} * {} + 1)", "jnp.sqrt(jnp.abs({}))", "jnp.log1p(jnp.abs({}))", "lax.erf({})",
         "lax.integer_pow({}, 3)", "jnp.square({})", "jnp.expm1(jnp.clip({}, -5, 5))", "1 / ({} * {} + 2)", "jnp.exp({})",
         "jnp.log(jnp.abs({}) + 1)", "jax.nn.softplus({})", "jnp.arctan({})", "lax.logistic({})", "jnp.cbrt({})")  # fmt: skip
EXACT = ("-{}", "jnp.abs({})", "lax.stop_gradient({})", "jnp.where(jnp.isnan({}), 0, {})", "jax.nn.relu({})")
CHOICES = ("jnp.floor({})", "jnp.ceil({})", "jnp.round({})", "jnp.sign({})", "jnp.isfinite({})", "jnp.isnan({})",
           "jnp.signbit({})", "jnp.nan_to_num({})")  # fmt: skip


def elementwise(g: Grower) -> None:
    v = g.pick(*FLOATS)
    if v is not None:
        form = str(g.one(*UNARY, *EXACT))
        g.add(form.replace("{}", v.name), v.exact and form in EXACT)


def chosen(g: Grower) -> None:
    """Functions with steps."""
    v = g.pick(*FLOATS, exact=True)
    if v is not None:
        g.add(str(g.one(*CHOICES)).replace("{}", v.name), True)


def _aligned(g: Grower, v: Line, *dtypes: str, exact: bool = False) -> str:
    """Something that broadcasts with `v`: a variable, a part of itself, or a new operand."""
    fits = [w for w in g.variables() if w.dtype in dtypes and w.shape == v.shape and (w.exact or not exact)]
    p = g.r.random()
    if fits and p < 0.6:
        return fits[g.up_to(len(fits) - 1)].name
    shape = tuple(n if g.chance(0.7) else 1 for n in v.shape)
    return g.operand(shape[g.up_to(len(shape)) :] if g.chance(0.3) else shape, str(g.one(*dtypes))).name


def binary(g: Grower) -> None:
    v = g.pick(*FLOATS)
    if v is None:
        return
    w = _aligned(g, v, v.dtype)
    exact = v.exact and {x.name: x.exact for x in g.variables()}[w]
    form = str(g.one("{} + {}", "{} - {}", "{} * {}", "{} / ({} * {} + 1)", "jnp.maximum({}, {})", "jnp.minimum({}, {})",
                     "jnp.arctan2({}, {})", "{} * 3 + {}", "jnp.where(jnp.arange({}.shape[-1]) % 2 == 0, {}, {})"))  # fmt: skip
    text = form.replace("{}", v.name, 1) if "where" not in form else form.replace("{}", v.name, 2)
    g.add(text.replace("{}", w), exact and ("where" in form or "imum" in form))


def integer(g: Grower) -> None:
    v = g.pick(*INTEGERS)
    if v is None:
        return
    w = _aligned(g, v, v.dtype)
    form = str(g.one("{} + {}", "{} - {}", "{} * {}", "{} // {}", "{} % {}", "lax.div({}, {})", "lax.rem({}, {})",
                     "{} & {}", "{} | {}", "{} ^ {}", "{} << ({} & 7)", "{} >> ({} & 7)", "jnp.maximum({}, {})",
                     "jnp.minimum({}, {})", "lax.shift_right_logical({}, {})", "lax.shift_left({}, {})"))  # fmt: skip
    if w == v.name and any(s in form for s in ("/", "%", "div", "rem")):
        return  # XLA takes x / x for 1, 0 / 0 included: nobody defines it
    unary = str(
        g.one("~{}", "-{}", "jnp.abs({})", "jnp.sign({})", "lax.population_count({})", "lax.clz({})", "{} * 3 - 7")
    )
    text = unary.replace("{}", v.name) if g.chance(0.3) else form.replace("{}", v.name, 1).replace("{}", w)
    g.add(text, v.exact and {x.name: x.exact for x in g.variables()}[w])


def compare(g: Grower) -> None:
    v = g.pick(*FLOATS, *INTEGERS, exact=True)
    if v is not None:
        w = _aligned(g, v, v.dtype, exact=True)
        g.add(f"{v.name} {g.one('<', '<=', '==', '!=', '>', '>=')} {w}", True)


def logic(g: Grower) -> None:
    v = g.pick("bool")
    if v is not None:
        w = _aligned(g, v, "bool", exact=True)
        g.add(str(g.one(f"{v.name} & {w}", f"{v.name} | {w}", f"~{v.name}", f"{v.name} ^ {w}", f"jnp.any({v.name}, -1)",
                        f"jnp.all({v.name})", f"jnp.sum({v.name}, -1)", f"{v.name}.astype(jnp.float32)")), v.exact)  # fmt: skip


def select(g: Grower) -> None:
    v = g.pick()
    if v is None or v.dtype == "bool":
        return
    c = _aligned(g, v, "bool", exact=True)
    w = _aligned(g, v, v.dtype) if g.chance(0.6) else str(g.one("0", "1", "7"))
    exact = {x.name: x.exact for x in g.variables()}
    g.add(f"jnp.where({c}, {v.name}, {w})", v.exact and exact.get(w, True) and exact[c])


def convert(g: Grower) -> None:
    v = g.pick()
    if v is None:
        return
    to = g.dtype()
    steps = v.dtype in FLOATS and to not in FLOATS
    if steps and not v.exact:
        return
    bits = numpy_dtype(v.dtype).itemsize == numpy_dtype(to).itemsize and v.exact and "bool" not in (v.dtype, to)
    if bits and g.chance(0.3) and to not in FLOATS:
        g.add(f"lax.bitcast_convert_type({v.name}, jnp.{to})", True)
    else:
        g.add(f"{v.name}.astype(jnp.{'bool_' if to == 'bool' else to})", v.exact)


def reduction(g: Grower) -> None:
    v = g.pick(rank=1)
    if v is None or v.dtype == "bool":
        return
    d = g.axis(v)
    axis = str(g.one(str(d), "-1", "None", str(tuple(sorted(set(int(x) for x in g.r.integers(0, len(v.shape), 2)))))))
    real = v.dtype in FLOATS
    forms = [
        "jnp.sum({}, {a})",
        "jnp.max({}, {a})",
        "jnp.min({}, {a})",
        "jnp.sum({}, {a}, keepdims=True)",
        "jnp.prod(jnp.clip({}, -2, 2), {d})" if real else "jnp.prod({}, {d})",  # 0 times a part that overflows
    ]
    if real:
        forms += ["jnp.mean({}, {a})", "jax.nn.softmax({}, {d})", "jnp.var({}, {a})", "jax.nn.logsumexp({}, {a})",
                  "{} - jnp.max({}, {d}, keepdims=True)", "jax.nn.log_softmax({}, {d})",
                  "{} * lax.rsqrt(jnp.mean({} * {}, {d}, keepdims=True) + 1e-5)", "jnp.linalg.norm({}, axis={d})"]  # fmt: skip
    form = str(g.one(*forms))
    if v.exact and g.chance(0.25):
        form = str(g.one("jnp.argmax({}, {d})", "jnp.argmin({}, {d})", "jnp.argmax({})", "jnp.count_nonzero({}, {d})"))
    exact = v.exact and (not real or any(s in form for s in ("jnp.max({}, {a})", "jnp.min", "arg", "count")))
    g.add(form.replace("{}", v.name).replace("{a}", axis).replace("{d}", str(d)), exact)


def cumulative(g: Grower) -> None:
    v = g.pick(*FLOATS, *INTEGERS, rank=1)
    if v is None:
        return
    d, back = g.axis(v), g.one("True", "False")
    f = str(g.one("lax.cumsum", "lax.cummax", "lax.cummin", "lax.cumprod"))
    bounded = f"jnp.clip({v.name}, -1, 1)" if f == "lax.cumprod" else v.name
    g.add(
        f"{f}({bounded}, {d}, reverse={back})",
        v.exact and (v.dtype in INTEGERS or "m" in f[-1:] + f[-3:-2] and "sum" not in f and "prod" not in f),
    )


def contraction(g: Grower) -> None:
    """einsum over random axes; a weight, a variable, or the same variable twice; repeated and broadcast operands."""
    v = g.pick(*FLOATS) if g.chance(0.85) else g.pick(*INTEGERS)
    if v is None or not 0 < len(v.shape) <= 4 or math.prod(v.shape) > 20_000:
        return
    letters = "abcd"[: len(v.shape)]
    roles = [str(g.one("k", "m", "b")) for _ in letters]
    if g.chance(0.7):
        roles[g.up_to(len(roles) - 1)] = "k"
    right = [c for c, role in zip(letters, roles, strict=True) if role != "m"]
    size = dict(zip(letters, v.shape, strict=True))
    new = ["x", "y"][: g.up_to(2)]
    size |= {c: int(g.r.choice(SIZES)) for c in new}
    right = [*right, *new]
    right = [right[i] for i in g.r.permutation(len(right))]
    out = [c for c, role in zip(letters, roles, strict=True) if role != "k"] + new
    out = [out[i] for i in g.r.permutation(len(out))]
    shape = tuple(size[c] for c in right)
    if math.prod(shape) > 60_000 or math.prod(size.values()) > 4_000_000:
        return
    fits = [w for w in g.variables() if w.shape == shape and w.dtype == v.dtype]
    w = (
        fits[g.up_to(len(fits) - 1)]
        if fits and g.chance(0.5)
        else g.operand(shape, v.dtype, "" if v.dtype in INTEGERS else "normal")
    )
    left, other = v.name, w.name
    for _ in range(g.up_to(1)):  # an operand that is repeated, sliced or broadcast on its way in
        d = g.up_to(max(0, len(shape) - 1))
        if shape and shape[d] % 2 == 0 and g.chance(0.5):
            half = ", ".join([":"] * d + [f": {shape[d] // 2}"])
            other = f"jnp.{g.one('repeat', 'tile')}({w.name}[{half}], 2, {d})" if "repeat" else other
            other = other if "repeat" in other else f"jnp.concatenate([{w.name}[{half}]] * 2, {d})"
        elif shape:
            other = f"jnp.broadcast_to({w.name}[{', '.join([':'] * d + ['0:1'])}], {shape})"
    accumulate = ", preferred_element_type=jnp.float32" if v.dtype in FLOATS and g.chance(0.3) else ""
    swap = g.chance(0.3)
    spec = f"{''.join(right)},{letters}" if swap else f"{letters},{''.join(right)}"
    pair = f"{other}, {left}" if swap else f"{left}, {other}"
    g.add(f"jnp.einsum('{spec}->{''.join(out)}', {pair}{accumulate})", v.dtype in INTEGERS and v.exact and w.exact)


def layer(g: Grower) -> None:
    """What models do to a row: norm, matrix, gate, residual."""
    v = g.pick("float32", "bfloat16", rank=2)
    if v is None:
        return
    k = v.shape[-1]
    n = int(g.r.choice(SIZES))
    kinds = f"jnp.{v.dtype}"
    normed = f"({v.name} * lax.rsqrt(jnp.mean(jnp.square({v.name}.astype(jnp.float32)), -1, keepdims=True) + 1e-6)).astype({kinds})"
    x = str(g.one(v.name, normed, f"jax.nn.silu({v.name})"))
    w = g.operand((k, n), v.dtype, "normal").name
    u = g.operand((k, n), v.dtype, "normal").name if g.chance(0.5) else w
    t = g.operand((n, k), v.dtype, "normal").name
    g.add(str(g.one(f"{x} @ {w}", f"jax.nn.silu({x} @ {w}) * ({x} @ {u})", f"{v.name} + ({x} @ {w}) @ {t}",
                    f"{x} @ {t}.T", f"{v.name} + jax.nn.gelu({x} @ {w}) @ {w}.T")), False)  # fmt: skip


def attention(g: Grower) -> None:
    b, t, s = g.up_to(2, 1), int(g.one(1, 1, 2, 5)), int(g.r.choice(SIZES))
    heads, group, d = g.up_to(3, 1), g.up_to(3, 1), int(g.one(2, 4, 7, 8, 16))
    dtype = str(g.one("float32", "float32", "bfloat16"))
    q, k, v = (
        g.operand(x, dtype, "normal").name for x in ((b, t, heads * group, d), (b, s, heads, d), (b, s, heads, d))
    )
    pos = g.operand((), "int32", "index", s).name
    if g.chance(0.5) and t <= s:  # a cache that is written first
        kn, vn = (g.operand((b, t, heads, d), dtype, "normal").name for _ in "kv")
        k = f"lax.dynamic_update_slice({k}, {kn}, (0, {pos}, 0, 0))"
        v = f"lax.dynamic_update_slice({v}, {vn}, (0, {pos}, 0, 0))"
        if g.chance(0.6):
            g.add(k, True)
            k = g.lines[-1].name
    lengths = g.operand((b, 1, 1, 1, 1), "int32", "index", s).name
    window, end = g.operand((), "int32", "index", s).name, f"jnp.arange({t})[:, None] + {pos}"
    mask = str(g.one("None", f"(jnp.arange({s}) <= {pos}) & (jnp.arange({s}) > {pos} - {window})",
                     f"(jnp.arange({s}) <= {end}) & (jnp.arange({s}) > {end} - {window})",
                     f"~((jnp.arange({s}) >= {lengths}) | (jnp.arange({s}) < {lengths} - 3))", f"jnp.arange({s}) <= {pos}", f"jnp.arange({s}) < {lengths}",
                     f"jnp.arange({s})[None] <= jnp.arange({t})[:, None] + {pos}",
                     g.operand((b, 1, 1, t, s), "bool").name))  # fmt: skip
    g.add(f"attend({q}, {k}, {v}, {mask}, {float(g.one(0.3, 0.125, 1.0))})", False)


def _index(g: Grower, limit: int, shape: tuple[int, ...]) -> str:
    if g.chance(0.4):
        return f"jnp.array({g.r.integers(0, limit, shape).tolist()}, jnp.int32)"
    fits = [w for w in g.variables() if w.dtype == "int32" and w.exact and w.shape == shape]
    if fits and g.chance(0.4):
        return fits[g.up_to(len(fits) - 1)].name
    return g.operand(shape, str(g.one("int32", "int32", "uint8", "int8")), "index", min(limit, 100)).name


def gather(g: Grower) -> None:
    v = g.pick(rank=1)
    if v is None:
        return
    d = g.axis(v)
    n = v.shape[d]
    lead = "".join(":, " for _ in range(d))
    mode = g.one("", ", mode='clip'", ", mode='fill'", ", mode='wrap'")
    along = tuple(m if k != d else g.up_to(4, 1) for k, m in enumerate(v.shape))
    windows = tuple(g.up_to(m, 1) for m in v.shape)
    starts = ", ".join(_index(g, m, ()) if g.chance(0.6) else str(g.up_to(m)) for m in v.shape)
    text = g.one(
        f"{v.name}[{lead}{_index(g, n, (g.up_to(5, 1),))}]", f"{v.name}[{lead}{_index(g, n, (2, 3))}]",
        f"jnp.take({v.name}, {_index(g, n, (g.up_to(5, 1),))}, {d}{mode})", f"{v.name}[{lead}{_index(g, n, ())}]",
        f"jnp.take_along_axis({v.name}, {_index(g, n, along)}, {d})", f"lax.dynamic_slice({v.name}, ({starts},), {windows})",
        f"lax.dynamic_index_in_dim({v.name}, {_index(g, n, ())}, {d})", f"{v.name}[{lead}{g.up_to(n - 1)}]",
    )  # fmt: skip
    g.add(str(text), v.exact)


def update(g: Grower) -> None:
    """Windows written: at constant places, at indices, added, dropped."""
    v = g.pick(rank=1)
    if v is None:
        return
    target = str(
        g.one(v.name, v.name, f"jnp.zeros_like({v.name})", f"({v.name} * 1)", f"jnp.full({v.shape}, 2, {v.name}.dtype)")
    )
    d = g.axis(v)
    n = v.shape[d]
    lead = ":, " * d
    rest = v.shape[:d] + v.shape[d + 1 :]
    a, z = sorted((g.up_to(n), g.up_to(n)))
    same = [w for w in g.variables() if w.dtype == v.dtype and len(w.shape) == len(v.shape)
            and all(x <= y for x, y in zip(w.shape, v.shape, strict=True))]  # fmt: skip
    w = same[g.up_to(len(same) - 1)]
    starts = ", ".join(_index(g, m, ()) if g.chance(0.5) else str(g.up_to(m)) for m in v.shape)
    how = "set" if v.dtype == "bool" else str(g.one("set", "set", "add"))
    many = _index(g, n, (g.up_to(4, 1),))
    mode = g.one("", ", mode='drop'", ", mode='clip'")
    scalar = "True" if v.dtype == "bool" else str(g.one("0", "1", "3"))
    value = str(g.one(scalar, f"{v.name}[{lead}{g.up_to(n - 1)}]"))
    # Indices that repeat make a `set` depend on an order that JAX does not promise; all values are then equal.
    text = g.one(
        f"{target}.at[{lead}{g.up_to(n - 1)}].{how}({value})", f"{target}.at[{lead}{a}:{z}].{how}({scalar})",
        f"{target}.at[{lead}{_index(g, n, ())}].{how}({value})", f"{target}.at[{lead}{a}:{z}:2].{how}({scalar})",
        f"{target}.at[{lead}{many}].{how}({scalar}{mode})", f"{target}.at[{', '.join(str(g.up_to(m - 1)) for m in v.shape)}].set({scalar})",
        f"lax.dynamic_update_slice({target}, {w.name}, ({starts},))", f"lax.dynamic_update_slice({target}, {w.name}, ({starts},))",
        f"lax.dynamic_update_index_in_dim({target}, {v.name}[{lead}{g.up_to(n - 1)}], {_index(g, n, ())}, {d})",
        f"jnp.where(jnp.arange({n}).reshape({tuple(n if k == d else 1 for k in range(len(v.shape)))}) == {_index(g, n, ())}, {scalar}, {target})",
        f"{target}.at[{lead}{g.up_to(n - 1)}].set({g.operand(rest, v.dtype).name})",
    )  # fmt: skip
    exact = {x.name: x.exact for x in g.variables()}
    g.add(str(text), v.exact and exact[w.name] and (v.dtype not in FLOATS or ".add(" not in str(text)))


def control(g: Grower) -> None:
    v = g.pick("float32", "int32", rank=1)
    if v is None:
        return
    n = v.shape[0]
    back = g.one("True", "False")
    body = str(g.one("c * 0.5 + x", "jnp.maximum(c, x)", "c + x * x")) if v.dtype == "float32" else "c * 3 + x"
    exact = v.exact and ("maximum" in body or v.dtype == "int32")
    p = g.operand((), "bool").name
    if n <= 40 and g.chance(0.6):
        g.add(f"scan(lambda c, x: {body}, {v.name}[0], {v.name}, {back})", exact)
    elif g.chance(0.5):
        g.add(f"lax.cond({p}, lambda x: x * 2, lambda x: -x, {v.name})", v.exact)
    else:
        g.add(
            f"lax.fori_loop(0, {g.up_to(4)}, lambda i, x: {body.replace('c', f'{v.name}[i % {n}]')}, {v.name})", exact
        )


def sorting(g: Grower) -> None:
    v = g.pick(*FLOATS, *INTEGERS, rank=1)
    if v is None:
        return
    d = g.axis(v)
    k = g.up_to(v.shape[-1], 1)
    # A computed NaN has any sign, and by that it is the first or the last for top_k.
    known = v.name if v.exact or v.dtype not in FLOATS else f"jnp.where(jnp.isnan({v.name}), jnp.nan, {v.name})"
    forms = [f"jnp.sort({v.name}, {d})", f"lax.top_k({known}, {k})[0]", f"jnp.sort({v.name}, {d}, descending=True)"]
    if v.exact:
        forms += [f"jnp.argsort({v.name}, {d})", f"lax.top_k({v.name}, {k})[1]", f"jnp.unique({v.name}, size={k}, fill_value=0)",
                  f"lax.sort(({v.name}, {v.name}[..., ::-1]), dimension={d}, num_keys=1)[1]", f"jnp.median({v.name}, {d})",
                  f"lax.sort(({v.name}, lax.broadcasted_iota(jnp.int32, {v.shape}, {d})), dimension={d}, num_keys=2)[1]"]  # fmt: skip
    text = str(g.one(*forms))
    g.add(text, v.exact and "median" not in text)


def chance(g: Grower) -> None:
    """Random bits are exact."""
    s = g.operand((), "uint32", "small").name
    shape = g.shape()
    key = str(
        g.one(
            f"jax.random.key({s})",
            f"jax.random.fold_in(jax.random.key(3), {s})",
            f"jax.random.split(jax.random.key({s}), 3)[1]",
        )
    )
    g.add(str(g.one(f"jax.random.bits({key}, {shape})", f"jax.random.uniform({key}, {shape})", f"jax.random.bernoulli({key}, 0.4, {shape})",
                    f"jax.random.randint({key}, {shape}, -5, 9)", f"jax.random.permutation({key}, 7)",
                    f"jax.random.bits(jax.random.clone({key}), {shape})")), True)  # fmt: skip
    if g.chance(0.3):
        g.add(f"jax.random.normal({key}, {shape})", False)


def index_space(g: Grower) -> None:
    shape = g.shape()
    d = g.up_to(max(0, len(shape) - 1))
    g.add(str(g.one(f"lax.broadcasted_iota(jnp.int32, {shape or (1,)}, {d})", f"jnp.arange({g.up_to(40, 1)})", f"jnp.eye({g.up_to(9, 1)})",
                    f"jax.nn.one_hot({g.operand((3,), 'int32', 'index', 5).name}, 6)", f"jnp.arange({g.up_to(9, 1)}) * 2")), True)  # fmt: skip


FAMILIES: dict[Callable[[Grower], None], float] = {
    move: 6, join: 1.5, elementwise: 2.5, chosen: 0.7, binary: 2.5, integer: 1.5, compare: 1, logic: 0.6, select: 1.2, convert: 1.5,
    reduction: 3, cumulative: 1, contraction: 3, layer: 1.2, attention: 0.8, gather: 2.2, update: 3, control: 0.6, sorting: 0.8,
    chance: 0.3, index_space: 0.5, **windows.FAMILIES,
}  # fmt: skip
"""How often each family is tried."""
