"""`.profile`: the times of a launch, and what is told of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_mpk import UnsupportedError, abi, megakernelize
from jax_mpk.device import H100
from jax_mpk.inspect.profile import PARTS, Profile, profile
from tests.execute import Runner


def network(x, w, v):
    return jax.nn.softmax(jnp.tanh(x @ w) @ v, -1)


def operands():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((8, 256), (256, 512), (512, 128))]


@pytest.fixture(scope="module")
def found() -> Profile:
    return megakernelize(network, implementation="cpu").profile(*operands())


def test_every_task_has_its_times(found):
    assert len(found.op) == len(found.at) > 4 and found.total > 0
    assert (np.diff(found.at, axis=1) >= 0).all() and found.at.min() == 0
    assert (found.worker < found.workers).all() and (found.wait >= 0).all() and (found.hop >= 0).all()
    for w in np.unique(found.worker):  # a worker is at one task at a time
        mine = found.at[found.worker == w]
        mine = mine[np.argsort(mine[:, 0])]
        assert (mine[1:, 0] >= mine[:-1, 3]).all()


def test_tasks_begin_after_what_they_need(found):
    by = {r.name: r for r in found.rows()}
    assert {r.where.split(" at ")[0] for r in by.values()} >= {"dot_general"}
    first, second = (n for n, o in enumerate(found.operators) if o.kind == "contract")
    assert found.at[found.op == second, 0].min() >= found.at[found.op == first, 3].min()


def test_a_workers_time_adds_up(found):
    spent = found.spent()
    assert spent.shape == (found.workers, len(PARTS)) and (spent >= -1e-6).all()
    np.testing.assert_allclose(spent.sum(1), found.total)


def test_table_trace_and_picture(found, tmp_path):
    text = str(found)
    assert "first task to the last" in text and all(r.name in text for r in found.rows())
    slices = [
        e for e in json.loads(found.trace(tmp_path / "t.json"))["traceEvents"] if e["ph"] == "X" and e["cat"] != "stage"
    ]
    assert len(slices) == len(found.op) and json.loads((tmp_path / "t.json").read_text())
    picture = ElementTree.fromstring(found.svg(tmp_path / "p.svg"))
    tips = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == len(found.op) and "http" not in (tmp_path / "p.svg").read_text().replace(
        "http://www.w3.org", ""
    )


def test_arguments_keep_their_values_and_modules_work():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    old, captured = jnp.ones((4, 16)), jnp.arange(16.0)

    def step(model, cache, x):
        cache = jax.lax.dynamic_update_slice(cache, model(x) + captured, (1, 0))
        return cache, cache.sum(-1)

    seen = megakernelize(step, implementation="cpu").profile(model, old, jnp.ones((1, 16)))
    assert len(seen.op) and (old == 1).all()


def test_keys_are_arguments_and_results():
    split = megakernelize(
        lambda key, x: (*jax.random.split(key), x + jax.random.normal(key, x.shape)), implementation="cpu"
    )
    assert split.profile(jax.random.key(1), jnp.ones(64)).total > 0
    with pytest.raises(TypeError, match="arrays"):
        split.profile(jax.random.key(1), jax.ShapeDtypeStruct((64,), jnp.float32))


def test_what_has_no_profile_says_so():
    mesh = jax.make_mesh((1,), ("d",))
    spec = jax.sharding.PartitionSpec()
    wrapped = megakernelize(lambda x: jnp.sin(x) * 2, implementation="cpu", mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(UnsupportedError, match="no profile of its own"):
        wrapped.profile(jnp.ones(8))
    with pytest.raises(UnsupportedError, match="fft"):
        megakernelize(lambda x: jnp.fft.fft(x).real, implementation="cpu").profile(jnp.ones(8))


def test_parts_and_stages_of_a_gpu():
    """Times that a kernel could have left: stages that a kind does not have are anywhere, parts end their task together."""

    def attend(q, k, v, w):
        s = jax.nn.softmax(jnp.einsum("bhd,bshd->bhs", q, k), -1)
        return jnp.einsum("bhs,bshd->bhd", s, v).reshape(1, -1) @ w

    b = jnp.bfloat16
    shapes = ((1, 4, 64), (1, 512, 4, 64), (1, 512, 4, 64), (256, 256))
    p = abi.decode(Runner(attend, *(jnp.ones(s, b) for s in shapes), target=replace(H100, profile=True)).blob)
    assert p["Kernel"]["profile"] == 32 * len(p["Task"]), "room for four times a task"
    tasks = p["Task"]
    assert tasks["part"].max() > 0
    level = np.array([{"ATTENTION": 0}.get(abi.ENUMS["Kind"][int(p["Op"][n]["kind"])], int(n)) for n in tasks["op"]])
    rng = np.random.default_rng(1)
    begin = 5_000_000 + 10_000 * level + rng.integers(0, 100, len(tasks))
    at = np.stack([begin, begin + 1_000, np.zeros_like(begin), begin + 3_000 + 50 * tasks["part"]], 1)
    seen = profile(p, "cuda", "f", at, tasks["worker"].astype(int), {}, {})
    np.testing.assert_allclose(seen.at[:, 1] - seen.at[:, 0], 1.0)
    assert (seen.at[:, 2] == seen.at[:, 1]).all(), "a stage that is not there takes no time"
    last = [n for n, o in enumerate(seen.operators) if o.kind == "contract"][-1]
    ends = seen.at[seen.op < last, 3].max()
    waited = seen.hop[(seen.op == last) & (seen.hop > 0)]
    assert len(waited) and abs(waited - (seen.at[seen.op == last, 0].min() - ends)).min() < 0.2
