"""Models in ordinary Flax, with checkpoint loaders; language models have a text generation command."""
