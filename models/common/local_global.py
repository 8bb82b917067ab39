"""Configurations of decoders in which most layers see a sliding window, and every so many-th sees all positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from models.common import limits
from models.common.errors import ConfigError
from models.common.fields import Field, Integer, OneOf, Several, shown
from models.common.rotary import ROTARY_FIELDS, ROTARY_OPTIONS, RotaryConfig
from models.common.shape import filled

LOCAL, GLOBAL = "sliding_attention", "full_attention"

LOCAL_GLOBAL_FIELDS = ROTARY_FIELDS | {
    "sliding_window": Field("sliding_window", Integer(1, limits.CONTEXT)),
    "global_every": Field("sliding_window_pattern", Integer(1, limits.LAYERS), None),
}
"""The fields of ``LocalGlobalConfig`` that are numbers."""

_LAYER_TYPES = Field("layer_types", Several(OneOf(LOCAL, GLOBAL)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalGlobalConfig(RotaryConfig):
    """A decoder with local and global layers.

    Attributes:
      sliding_window: how many positions a query of a local layer sees, itself included.
      global_every: layers ``global_every - 1``, ``2 * global_every - 1`` and so on are global, the others local.
      default_global_every: ``global_every`` where a ``config.json`` says nothing else.
    """

    fields = LOCAL_GLOBAL_FIELDS
    options = ROTARY_OPTIONS | {"layer_types": _LAYER_TYPES}
    default_global_every: ClassVar[int]

    sliding_window: int
    global_every: int

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees all positions."""
        return (layer + 1) % self.global_every == 0

    def window(self, layer: int) -> int | None:
        return None if self.is_global(layer) else self.sliding_window

    @classmethod
    def _read(cls, hf: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        return super()._read(hf, problems) | {"layer_types": hf.get("layer_types")}

    @classmethod
    def _derive(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Also checks the list of layers, which newer files have, against the number that older files have."""
        values = super()._derive(values)
        found = values.pop("layer_types")
        if found is None:
            return filled(values, global_every=cls.default_global_every)
        found, given = list(found), values["global_every"]
        first = found.index(GLOBAL) + 1 if GLOBAL in found else len(found) + 1
        for every in (cls.default_global_every, first) if given is None else (given,):
            if found == _layer_types(values["num_layers"], every):
                return values | {"global_every": every}
        expected = f"every {given or first}-th of {values['num_layers']} to be '{GLOBAL}' and the others '{LOCAL}'"
        raise ConfigError(f"'layer_types' is {shown(found)}, expected {expected}")

    def to_hf(self) -> dict[str, Any]:
        return super().to_hf() | {"layer_types": _layer_types(self.num_layers, self.global_every)}


def _layer_types(layers: int, every: int) -> list[str]:
    return [LOCAL if (layer + 1) % every else GLOBAL for layer in range(layers)]
