"""`python -m jax_mpk.abi` prints `ffi/abi.h`."""

import sys

from jax_mpk.abi import header

sys.stdout.write(header())
