"""The numeric gate: a speed counts only beside an error that is no worse than that of ``jax.jit``.

Three programs decode the same tokens from the same cache: the reference (the same weights in float32, products at the
highest precision), ``jax.jit`` of the function as it is, and the candidate. All are fed the reference's greedy tokens,
so that every position of every program has the same prefix and can be compared. The gate asks that

1. the root mean square error of the candidate's logits is at most ``MEAN_LIMIT`` times that of ``jax.jit``;
2. its largest error is at most ``MAX_LIMIT`` times that of ``jax.jit`` (looser: an extreme is a noisier number);
3. its greedy token is the reference's wherever the reference's top-1 margin (first logit less second) exceeds the
   *noise*, the largest absolute error of any logit of ``jax.jit`` in the run; such tokens are called decisive;
4. the token that it returns is the argmax of the logits that it returns;
5. the timed loop ends at the tokens that its steps one by one end at (``check_loop``).

Errors below ``FLOOR`` times the size of the logits are taken as ``FLOOR``: in float32 on a CPU, ``jax.jit`` computes
just what the reference does, and another order of summation is no error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from benchmarks.subject import Subject, Wrapper, plain, start

MEAN_LIMIT = 1.25
MAX_LIMIT = 2.0
FLOOR = 1e-5
PEAK = 6.0
"""How much larger than the root mean square a largest error is allowed to be at the floor."""


@dataclass
class Error:
    """Errors of one program's logits against the reference, gathered step by step."""

    squares: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, logits: np.ndarray, reference: np.ndarray) -> None:
        difference = logits.astype(np.float64) - reference
        self.squares += float(np.sum(difference * difference))
        self.count += difference.size
        self.largest = float(np.maximum(self.largest, np.max(np.abs(difference))))  # keeps a NaN

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.count)) ** 0.5


@dataclass
class Gate:
    """What the gate found. ``mismatches``: (position, row, reference's token, candidate's) of decisive tokens."""

    steps: int
    first_position: int
    reference: str
    logits_rms: float
    jit_rms: float
    rms: float
    jit_largest: float
    largest: float
    noise: float
    tokens: int
    decisive: int
    jit_mismatches: int
    mismatches: list[tuple[int, int, int, int]]
    failures: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Error of the candidate over that of ``jax.jit``, both at least the floor."""
        floor = FLOOR * self.logits_rms
        return max(self.rms, floor) / max(self.jit_rms, floor) if self.rms == self.rms else float("nan")

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "passed": self.passed}

    def __str__(self) -> str:
        tokens = f"{self.decisive - len(self.mismatches)}/{self.decisive} of {self.tokens}"
        return f"{'pass' if self.passed else 'FAIL'} {self.ratio:.2f}x, {tokens}"


class Player:
    """One program with a cache of its own."""

    def __init__(self, subject: Subject, wrap: Wrapper, token: Any, cache: Any):
        self.leaves, self.cache = subject.leaves, cache
        self.run = subject.compile_step(wrap, token, cache)

    def feed(self, token: Any, pos: int) -> tuple[np.ndarray, np.ndarray]:
        """The next token and the logits after ``token`` at ``pos``."""
        token, logits, self.cache = self.run(self.leaves, token, self.cache, np.int32(pos))
        return np.asarray(token), np.asarray(logits)


def check(
    subject: Subject,
    wrap: Wrapper,
    reference: Subject,
    *,
    batch: int,
    slots: int,
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> Gate:
    """Decodes the last ``steps`` positions of a cache of ``slots`` with all three programs and compares them.

    Args:
      wrap: makes the candidate of the step.
      reference: ``upcast`` of the model; it runs where its weights are.
      tick: called after every step.
    """
    first = slots - steps
    (device,) = reference.leaves[0].devices()
    token, cache = start(subject.model, batch, slots)
    exact = jax.tree.map(lambda x: jax.device_put(x, device).astype(np.float32), start(subject.model, batch, slots)[1])
    with jax.default_matmul_precision("highest"):
        truth_player = Player(reference, plain, jax.device_put(token, device), exact)
    baseline = Player(subject, plain, token, cache)
    candidate = Player(subject, wrap, token, start(subject.model, batch, slots)[1])

    fed = np.asarray(token)
    size, jit, ours = Error(), Error(), Error()
    margins, expected, jit_tokens, tokens, inconsistent = [], [], [], [], 0
    for pos in range(first, first + steps):
        following, truth = truth_player.feed(jax.device_put(fed, device), pos)
        jit_token, jit_logits = baseline.feed(fed, pos)
        our_token, our_logits = candidate.feed(fed, pos)
        size.add(truth, np.zeros_like(truth))
        jit.add(jit_logits, truth)
        ours.add(our_logits, truth)
        inconsistent += int(np.sum(our_token != np.argmax(our_logits, axis=-1)))
        two = np.partition(truth, -2, axis=-1)[:, -2:]
        margins.append(two[:, 1] - two[:, 0])
        expected.append(following)
        jit_tokens.append(jit_token)
        tokens.append(our_token)
        fed = following
        tick()

    noise = max(jit.largest, PEAK * FLOOR * size.rms)
    decisive = np.stack(margins) > noise
    expected, tokens = np.stack(expected), np.stack(tokens)
    wrong = [
        (first + int(step), int(row), int(expected[step, row]), int(tokens[step, row]))
        for step, row in np.argwhere(decisive & (tokens != expected))
    ]
    gate = Gate(
        steps=steps,
        first_position=first,
        reference=f"float32, highest precision, on {device.platform}",
        logits_rms=size.rms,
        jit_rms=jit.rms,
        rms=ours.rms,
        jit_largest=jit.largest,
        largest=ours.largest,
        noise=noise,
        tokens=expected.size,
        decisive=int(decisive.sum()),
        jit_mismatches=int(np.sum(decisive & (np.stack(jit_tokens) != expected))),
        mismatches=wrong,
    )
    gate.failures = _failures(gate, inconsistent)
    return gate


def _failures(gate: Gate, inconsistent: int) -> list[str]:
    """Why a gate does not pass. A NaN compares false and so fails."""
    floor, failures = FLOOR * gate.logits_rms, []
    if not gate.rms <= MEAN_LIMIT * max(gate.jit_rms, floor):
        failures.append(f"rms error {gate.rms:.3g} is more than {MEAN_LIMIT} times that of jax.jit, {gate.jit_rms:.3g}")
    if not gate.largest <= MAX_LIMIT * max(gate.jit_largest, PEAK * floor):
        failures.append(f"largest error {gate.largest:.3g} is more than {MAX_LIMIT} times that of jax.jit")
    if gate.mismatches:
        failures.append(f"{len(gate.mismatches)} decisive tokens differ, the first at {gate.mismatches[0]}")
    if inconsistent:
        failures.append(f"{inconsistent} returned tokens are not the argmax of the returned logits")
    return failures


def check_loop(gate: Gate, subject: Subject, wrap: Wrapper, *, slots: int, steps: int, final: np.ndarray) -> None:
    """Adds a failure unless ``steps`` single steps end at ``final``, the tokens that the timed loop ended at."""
    token, cache = start(subject.model, len(final), slots)
    player = Player(subject, wrap, token, cache)
    for pos in range(slots - steps, slots):
        token, _ = player.feed(token, pos)
    if not np.array_equal(token, final):
        gate.failures.append(f"the timed loop ends at tokens {final.tolist()}, its steps at {token.tolist()}")
