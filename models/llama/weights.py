"""Hugging Face checkpoints of Llama 3."""

from models.common.names import decoder_tensors, ignored_tensors
from models.common.pretrained import Pretrained
from models.llama.config import LlamaConfig
from models.llama.model import Llama

PRETRAINED = Pretrained(Llama, LlamaConfig, decoder_tensors, ignored_tensors)
from_pretrained, save_pretrained = PRETRAINED.load, PRETRAINED.save
