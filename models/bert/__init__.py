"""BERT encoders, and sentence embeddings made with them."""

from models.bert.config import PRESETS, BertConfig
from models.bert.embed import batch_of, embed
from models.bert.model import Bert
from models.bert.weights import from_pretrained, save_pretrained

__all__ = ["PRESETS", "Bert", "BertConfig", "batch_of", "embed", "from_pretrained", "save_pretrained"]
