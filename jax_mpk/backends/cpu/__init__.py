"""The CPU backend: the prebuilt executor of the extension module behind a custom call (`backend`)."""
