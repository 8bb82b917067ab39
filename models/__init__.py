"""Decoder-only language models in ordinary Flax, with checkpoint loaders and a text generation command."""
