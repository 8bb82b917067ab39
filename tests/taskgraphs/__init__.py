"""Random task graphs that are sound, damages that may make them unsound, and an oracle that says which.

Nothing here uses the compiler passes or the verifier, so it can judge both.
"""

from tests.taskgraphs.builder import Builder
from tests.taskgraphs.damages import Damage, damages
from tests.taskgraphs.decoder import decoder
from tests.taskgraphs.oracle import oracle
from tests.taskgraphs.random import sound

__all__ = ["Builder", "Damage", "damages", "decoder", "oracle", "sound"]
