"""Mamba-2 shapes."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Self

from models.common import limits
from models.common.fields import Field, Flag, Integer, OneOf, Real
from models.common.shape import OPTIONS, Shape

_INFINITY = {"__float__": "Infinity"}  # as ``config.json`` spells what JSON has no number for


_LONGEST = 1e6  # of steps, which are 0.1 or less at first


class StepRange:
    """The kind of a pair of numbers, ascending, of which the second may be infinite."""

    def __call__(self, value: Any) -> tuple[float, float]:
        low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
        high = math.inf if high == _INFINITY else high
        if not all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in (low, high)):
            raise ValueError
        if not 0 <= low <= _LONGEST or not (low <= high <= _LONGEST or high == math.inf):
            raise ValueError
        return float(low), float(high)

    def __str__(self) -> str:
        return f"a list of two numbers from 0 to {_LONGEST:g}, ascending, of which the second may be infinite"


@dataclasses.dataclass(frozen=True)
class Mamba2Config(Shape):
    """A language model of Mamba-2 blocks.

    Attributes:
      state_size: numbers of state that each feature of a head has.
      num_groups: input and output projections of the state, each shared by ``num_heads / num_groups`` heads.
      conv_size: positions that the convolution sees.
      chunk_size: positions of a prefill that are done at once, by matrix products; the next ones get a state of them.
      step_range: what the step of the state's differential equation is clipped to.
      wide_residual: whether the residual stream is float32 in a model of another dtype.
    """

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    fields = {
        "vocab_size": Field("vocab_size", Integer(1, limits.VOCABULARY)),
        "hidden_size": Field("hidden_size", Integer(1, limits.HIDDEN)),
        "num_layers": Field("num_hidden_layers", Integer(1, limits.LAYERS)),
        "num_heads": Field("num_heads", Integer(1, limits.HEADS)),
        "head_dim": Field("head_dim", Integer(1, limits.HEAD_DIM)),
        "state_size": Field("state_size", Integer(1, limits.HEAD_DIM)),
        "num_groups": Field("n_groups", Integer(1, limits.HEADS)),
        "expand": Field("expand", Integer(1, 64), 2),
        "conv_size": Field("conv_kernel", Integer(2, 64), 4),
        "chunk_size": Field("chunk_size", Integer(1, 4096), 256),
        "norm_eps": Field("layer_norm_epsilon", Real(1e-12, 1.0), 1e-5),
        "step_range": Field("time_step_limit", StepRange(), (0.0, math.inf)),
        "wide_residual": Field("residual_in_fp32", Flag(), True),
        "use_bias": Field("use_bias", Flag(), False),
        "use_conv_bias": Field("use_conv_bias", Flag(), True),
        "tie_embeddings": Field("tie_word_embeddings", Flag(), False),
    }
    options = OPTIONS | {
        "hidden_act": Field("hidden_act", OneOf("silu", "swish"), None),  # two names of one function
        "rms_norm": Field("rms_norm", OneOf(True), None),
    }
    constants = {"hidden_act": "silu"}

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    expand: int = 2
    conv_size: int = 4
    chunk_size: int = 256
    norm_eps: float = 1e-5
    step_range: tuple[float, float] = (0.0, math.inf)
    wide_residual: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_embeddings: bool = False

    def conflicts(self) -> list[str]:
        problems = []
        if self.num_heads * self.head_dim != self.inner_size:
            problems.append(
                f"{self.num_heads} heads of {self.head_dim} features are {self.num_heads * self.head_dim}, expected expand "
                f"times hidden_size, which is {self.inner_size}"
            )
        if self.num_heads % self.num_groups:
            problems.append(
                f"{self.num_heads} heads cannot share {self.num_groups} groups evenly, expected num_heads to be a "
                "multiple of n_groups"
            )
        return problems

    @property
    def inner_size(self) -> int:
        """Features of all heads together."""
        return self.expand * self.hidden_size

    @property
    def conv_width(self) -> int:
        """Features that the convolution works on: those of the heads, and what enters and leaves the state."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    def to_hf(self) -> dict[str, Any]:
        hf = super().to_hf()
        low, high = hf.pop("time_step_limit")
        if (low, high) == (0.0, math.inf):  # the default, for readers that do not know how infinity is spelled
            return hf
        return hf | {"time_step_limit": [low, _INFINITY if high == math.inf else high]}

    @classmethod
    def mamba2_130m(cls) -> Self:
        return cls(
            vocab_size=50_288,
            hidden_size=768,
            num_layers=24,
            num_heads=24,
            head_dim=64,
            state_size=128,
            num_groups=1,
            tie_embeddings=True,
        )

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests."""
        fields = dict(
            vocab_size=96,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            head_dim=16,
            state_size=8,
            num_groups=2,
            chunk_size=8,
        )
        return cls(**(fields | changes))


PRESETS = {"mamba2-130m": Mamba2Config.mamba2_130m, "mamba2-tiny": Mamba2Config.tiny}
"""Shapes by name."""
