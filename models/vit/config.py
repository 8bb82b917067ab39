"""ViT shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from models.common import limits
from models.common.errors import ConfigError
from models.common.fields import Field, Flag, Integer, OneOf, Real, plain, shown
from models.common.shape import OPTIONS, Shape, uneven

_SIDE = 1 << 14  # of an image; the largest that such models were published for is 1,024 pixels wide


@dataclasses.dataclass(frozen=True)
class ViTConfig(Shape):
    """A pre-norm encoder of square images cut into square patches, with a class token and a linear classifier."""

    model_type = "vit"
    architecture = "ViTForImageClassification"
    fields = {
        "hidden_size": Field("hidden_size", Integer(1, limits.HIDDEN)),
        "intermediate_size": Field("intermediate_size", Integer(1, limits.INTERMEDIATE)),
        "num_layers": Field("num_hidden_layers", Integer(1, limits.LAYERS)),
        "num_heads": Field("num_attention_heads", Integer(1, limits.HEADS)),
        "image_size": Field("image_size", Integer(1, _SIDE), 224),
        "patch_size": Field("patch_size", Integer(1, _SIDE), 16),
        "num_channels": Field("num_channels", Integer(1, 1024), 3),
        "num_labels": Field("num_labels", Integer(1, limits.VOCABULARY), 2),
        "qkv_bias": Field("qkv_bias", Flag(), True),
        "norm_eps": Field("layer_norm_eps", Real(1e-14, 1.0), 1e-12),
    }
    options = OPTIONS | {"hidden_act": Field("hidden_act", OneOf("gelu"), None)}
    constants = {"hidden_act": "gelu"}

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_labels: int
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    norm_eps: float = 1e-12

    def conflicts(self) -> list[str]:
        problems = uneven(self.hidden_size, self.num_heads)
        if self.image_size % self.patch_size:
            problems.append(
                f"image_size is {self.image_size}, expected a multiple of patch_size, which is {self.patch_size}"
            )
        return problems

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: object = "config.json") -> Self:
        """See ``Shape.from_hf``. The number of labels is that of their names, where there are names."""
        names = hf.get("id2label")
        if names is not None and not isinstance(names, Mapping):
            raise ConfigError(f"{plain(where)}: 'id2label' is {shown(names)}, expected an object or null")
        return super().from_hf(hf if names is None else dict(hf) | {"num_labels": len(names)}, where)

    def to_hf(self) -> dict[str, Any]:
        names = [f"LABEL_{i}" for i in range(self.num_labels)]
        hf = super().to_hf()
        del hf["num_labels"]  # which the names say; other readers take these two
        return hf | {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }

    @classmethod
    def vit_base_patch16_224(cls) -> Self:
        return cls(hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, num_labels=1000)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """Two small layers for tests."""
        fields = dict(
            hidden_size=48,
            intermediate_size=80,
            num_layers=2,
            num_heads=4,
            num_labels=10,
            image_size=24,
            patch_size=8,
        )
        return cls(**(fields | changes))


PRESETS = {"vit-base-patch16-224": ViTConfig.vit_base_patch16_224, "vit-tiny": ViTConfig.tiny}
"""Shapes by name."""
