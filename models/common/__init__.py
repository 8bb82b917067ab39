"""What the model families share: rotary embeddings, cached attention, the decoder, and checkpoint files."""
