"""Whisper shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from models.common import limits
from models.common.fields import Field, Integer, OneOf
from models.common.shape import OPTIONS, Shape, uneven


@dataclasses.dataclass(frozen=True)
class WhisperConfig(Shape):
    """An encoder of log-mel spectrograms, and a decoder of text that attends to it.

    Attributes:
      audio_len: positions of the encoder, half as many as frames of a spectrogram.
      max_len: positions of the decoder.
      start_token: what every text begins with.
    """

    model_type = "whisper"
    architecture = "WhisperForConditionalGeneration"
    fields = {
        "vocab_size": Field("vocab_size", Integer(1, limits.VOCABULARY)),
        "hidden_size": Field("d_model", Integer(2, limits.HIDDEN, multiple=2)),
        "encoder_layers": Field("encoder_layers", Integer(1, limits.LAYERS)),
        "encoder_heads": Field("encoder_attention_heads", Integer(1, limits.HEADS)),
        "encoder_intermediate_size": Field("encoder_ffn_dim", Integer(1, limits.INTERMEDIATE)),
        "decoder_layers": Field("decoder_layers", Integer(1, limits.LAYERS)),
        "decoder_heads": Field("decoder_attention_heads", Integer(1, limits.HEADS)),
        "decoder_intermediate_size": Field("decoder_ffn_dim", Integer(1, limits.INTERMEDIATE)),
        "num_mel_bins": Field("num_mel_bins", Integer(1, 1024), 80),
        "audio_len": Field("max_source_positions", Integer(1, limits.CONTEXT), 1500),
        "max_len": Field("max_target_positions", Integer(1, limits.CONTEXT), 448),
        "start_token": Field("decoder_start_token_id", Integer(0, limits.VOCABULARY - 1)),
        "eos_token": Field("eos_token_id", Integer(0, limits.VOCABULARY - 1)),
    }
    options = OPTIONS | {
        "activation_function": Field("activation_function", OneOf("gelu"), None),
        "scale_embedding": Field("scale_embedding", OneOf(False), None),
        "tie_word_embeddings": Field("tie_word_embeddings", OneOf(True), None),
    }
    constants = {"activation_function": "gelu", "scale_embedding": False, "is_encoder_decoder": True}

    vocab_size: int
    hidden_size: int
    encoder_layers: int
    encoder_heads: int
    encoder_intermediate_size: int
    decoder_layers: int
    decoder_heads: int
    decoder_intermediate_size: int
    num_mel_bins: int = 80
    audio_len: int = 1500
    max_len: int = 448
    start_token: int = 50_258
    eos_token: int = 50_257

    def conflicts(self) -> list[str]:
        problems = uneven(self.hidden_size, self.encoder_heads) + uneven(self.hidden_size, self.decoder_heads)
        for name, token in (("decoder_start_token_id", self.start_token), ("eos_token_id", self.eos_token)):
            if token >= self.vocab_size:
                problems.append(f"{name} is {token}, expected less than vocab_size, which is {self.vocab_size}")
        return problems

    @classmethod
    def whisper_tiny(cls) -> Self:
        sides = dict(encoder_layers=4, encoder_heads=6, encoder_intermediate_size=1536)
        sides |= dict(decoder_layers=4, decoder_heads=6, decoder_intermediate_size=1536)
        return cls(vocab_size=51_865, hidden_size=384, **sides)

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """A layer of encoder and two of decoder, for tests."""
        fields = dict(
            vocab_size=96,
            hidden_size=48,
            encoder_layers=1,
            encoder_heads=4,
            encoder_intermediate_size=80,
            decoder_layers=2,
            decoder_heads=6,
            decoder_intermediate_size=64,
            num_mel_bins=10,
            audio_len=12,
            max_len=24,
            start_token=1,
            eos_token=2,
        )
        return cls(**(fields | changes))


PRESETS = {"whisper-tiny": WhisperConfig.whisper_tiny, "whisper-test": WhisperConfig.tiny}
"""Shapes by name."""
