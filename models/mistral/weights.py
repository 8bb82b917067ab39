"""Hugging Face checkpoints of Mistral."""

from models.common.names import decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.mistral.config import MistralConfig
from models.mistral.model import Mistral

PRETRAINED = Pretrained(Mistral, MistralConfig, decoder_tensors, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
