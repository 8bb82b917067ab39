"""`flax.nnx` modules among the arguments: what a function does to them arrives at the caller, as with `nnx.jit`.

A module is a graph of objects with identity; a traced function sees arrays. So modules are split into their structure and
their arrays before the trace, put together again inside of it, and split once more when the function has ended. Outside,
Variables whose arrays changed are set; where the structure changed (new Variables, other attributes), or modules are
returned, the caller's objects are brought to the new structure. A Variable that did not change is left alone, so a
module from outside of an enclosing trace may be read, like any array that a function closes over.

Flax is imported only when one of its objects is an argument.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jax_mpk.errors import StateError
from jax_mpk.trace import Fact

TAG = "jax_mpk"
"""Under which `nnx.update_context` keeps which object inside is which outside."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["graph"])
@dataclass(frozen=True)
class _Split:
    """A module as a pytree: its `nnx.GraphDef`, and its Variables with their paths (`FlatState`)."""

    graph: Any
    state: Any


def _is_split(x: Any) -> bool:
    return isinstance(x, _Split)


def _is_node(x: Any) -> bool:
    """True for what has identity in nnx: modules, Variables, and whatever else Flax registers."""
    from flax import nnx

    return isinstance(x, nnx.Variable) or nnx.graph.is_graph_node(x)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(path, node) of every outermost node."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)[0]
    return [(path, x) for path, x in leaves if _is_node(x)]


def among(tree: Any) -> bool:
    """Whether there is an nnx object in a pytree."""
    return "flax.nnx" in sys.modules and any(map(_is_node, jax.tree.leaves(tree, is_leaf=_is_node)))


def unbound(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A method of an nnx module, or a module that is called, as a function and its first argument; else `fn` and ()."""
    if "flax.nnx" not in sys.modules:
        return fn, ()
    owner = getattr(fn, "__self__", None)
    if owner is not None and _is_node(owner) and hasattr(fn, "__func__"):
        return fn.__func__, (owner,)
    return (type(fn).__call__, (fn,)) if _is_node(fn) else (fn, ())


def _split(context: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: _Split(*context.flatten(x)) if _is_node(x) else x, tree, is_leaf=_is_node)


def _merge(context: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: context.unflatten(x.graph, x.state) if _is_split(x) else x, tree, is_leaf=_is_split)


def _structures(nodes: list[Any]) -> list[Any]:
    from flax import nnx

    with nnx.split_context() as context:
        return [context.flatten(x)[0] for x in nodes]


_pure: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = weakref.WeakKeyDictionary()


def pure(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as a function of split arguments `(args, kwargs)`; the same object for the same function. It gives the split
    modules of the arguments, the split result, and whether a structure changed."""
    if fn not in _pure:
        ref = weakref.ref(fn)  # the dictionary holds what is here: it must not hold its own key

        def of_split(tree: Any) -> Any:
            from flax import nnx

            call = ref()
            assert call is not None, "whoever calls this holds the function"
            with nnx.merge_context(TAG, inner=True) as context:
                args, kwargs = _merge(context, tree)
            nodes = [x for _, x in _nodes((args, kwargs))]
            before = _structures(nodes)
            out = call(*args, **kwargs)
            changed = _structures(nodes) != before
            with nnx.split_context(TAG) as context:
                return _split(context, nodes), _split(context, out), Fact(changed)

        _pure[fn] = functools.wraps(fn, updated=())(of_split)
        del vars(_pure[fn])["__wrapped__"]
    return _pure[fn]


def make_jaxpr(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """`jax.make_jaxpr` of a call without results, also for modules that are no pytrees, and what it is a function of."""
    if not among((args, kwargs)):
        closed = jax.make_jaxpr(lambda *a, **k: (fn(*a, **k), None)[1])(*args, **kwargs)
        return closed, jax.tree.leaves((args, kwargs))
    from flax import nnx

    def of_split(tree: Any) -> None:
        with nnx.merge_context() as context:
            inner_args, inner_kwargs = _merge(context, tree)
        fn(*inner_args, **inner_kwargs)

    with nnx.split_context() as context:
        tree = _split(context, (args, kwargs))
    return jax.make_jaxpr(of_split)(tree), jax.tree.leaves(tree)


@dataclass(frozen=True)
class _Leaf:
    """A Variable (or an array that is an attribute) of a module among the arguments, before and after. `moved`: its arrays
    are others than those that went in."""

    path: str
    before: Any
    after: Any
    moved: bool


def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any],
         heads: Sequence[str], lost: str = "") -> Any:  # fmt: skip
    """`fn(*args, **kwargs)` with its effects on modules. `run` traces and calls a function of pytrees
    (`Megakernelized._run`). `heads`: what the positional arguments are called. `lost`: why no update arrives at the caller.

    Raises `StateError` for an update that would be lost.
    """
    from flax import nnx

    with nnx.update_context(TAG) as update:
        with nnx.split_context(TAG) as context:
            tree = _split(context, (args, kwargs))
        (after, out, changed), origin = run(pure(fn), (tree,), {}, functools.partial(argument_names, heads, tree))
        numbered = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
        nodes = _nodes((args, kwargs))
        leaves: list[_Leaf] = []
        if not changed.value:
            before = [x for x in jax.tree.leaves(tree, is_leaf=_is_split) if _is_split(x)]
            number = [x for x in jax.tree.leaves(numbered, is_leaf=_is_split) if _is_split(x)]
            for (path, _), *states in zip(nodes, before, after, number, origin()[0], strict=True):
                leaves += _leaves(heads, path, *(x.state for x in states))
        moved = [x for x in leaves if x.moved]
        rebuilt = changed.value or not all(map(_settable, moved))
        if lost and (moved or rebuilt):
            raise StateError(f"{_list([x.path for x in moved] or [label(heads, p) for p, _ in nodes])}: {lost}")
        if rebuilt:
            for path, x in nodes:
                _check(heads, path, x)
        else:
            for x in moved:
                _set(x.path, x.before, x.before)  # all or none
            for x in moved:
                _set(x.path, x.before, x.after)
        with nnx.merge_context(TAG, inner=False) as context:
            if rebuilt:
                _merge(context, after)
            elif update.outer_index_outer_ref:  # what the result shares with the arguments is the caller's own
                context.index_ref.update(update.outer_index_outer_ref)
            return _merge(context, out)


def _leaves(heads: Sequence[str], path: Any, before: Any, after: Any, number: Any, origin: Any) -> list[_Leaf]:
    """The leaves of one module from its state before and after, and those states with argument numbers for arrays."""
    rows = zip(before.paths, before.leaves, after.leaves, number.leaves, origin.leaves, strict=True)
    return [
        _Leaf(label(heads, path, inside), x, y, jax.tree.leaves(n) != jax.tree.leaves(o)) for inside, x, y, n, o in rows
    ]


def _settable(leaf: _Leaf) -> bool:
    """Whether the new arrays can be put into the Variable: it is one, and is held by value (Flax marks references)."""
    from flax import nnx

    if not isinstance(leaf.before, nnx.Variable):
        return False
    before: Any = jax.tree.structure(leaf.before)
    return bool(before == jax.tree.structure(leaf.after))


def _set(path: str, variable: Any, value: Any) -> None:
    from flax import errors

    try:
        variable.set_raw_value(value.get_raw_value())
    except errors.TraceContextError as e:
        raise StateError(f"{path} ({type(variable).__name__}) {_OUTSIDE}") from e


_OUTSIDE = ("is updated, but it was made outside of the function that is being traced, where a traced value may not go: "
            "make it an argument of that function, as nnx.jit does, or return what changed")  # fmt: skip


def _check(heads: Sequence[str], path: Any, node: Any) -> None:
    """Raises `StateError` if a module, or a Variable in it, belongs to another trace."""
    from flax import errors, nnx

    for at, x in nnx.iter_graph(node):
        name = label(heads, path, at)
        if isinstance(x, nnx.Variable):
            _set(name, x, x)
        elif isinstance(x, nnx.Pytree):
            try:
                x._check_valid_context(lambda: name)
            except errors.TraceContextError as e:
                raise StateError(f"{name} ({type(x).__name__}) {_OUTSIDE}") from e


def _list(paths: list[str]) -> str:
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def label(heads: Sequence[str], path: tuple[Any, ...], inside: tuple[Any, ...] = ()) -> str:
    """A path in `(args, kwargs)`, and from there in a module, as people write it: `args[0]['net'].layers[1].kernel`.
    `heads`: what the positional arguments are called."""
    head, rest = ("kwargs", path[1:]) if path[0].idx else (heads[path[1].idx], path[2:])
    attributes = (f".{k}" if isinstance(k, str) and k.isidentifier() else f"[{k!r}]" for k in inside)
    return "".join([head, jax.tree_util.keystr(rest), *attributes])


def argument_names(heads: Sequence[str], tree: Any) -> list[str]:
    """The labels of the leaves of `(args, kwargs)`, split or not."""
    out = []
    for path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_split)[0]:
        rows = zip(x.state.paths, x.state.leaves, strict=True) if _is_split(x) else [((), x)]
        out += [label(heads, path, inside) for inside, leaf in rows for _ in jax.tree.leaves(leaf)]
    return out
