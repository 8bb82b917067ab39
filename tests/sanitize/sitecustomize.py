"""Every Python process with this folder on its PYTHONPATH takes `jax_mpk._ext` from MPK_EXT (see `./BUILD sanitize`)."""

import importlib.util
import os
import sys


class _Sanitized:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, os.environ["MPK_EXT"]) if name == "jax_mpk._ext" else None


sys.meta_path.insert(0, _Sanitized)
