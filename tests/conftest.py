"""Before JAX starts: eight CPU devices, threads enough for their collectives, and no user's program cache."""

import os
import sys
from pathlib import Path

os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_MPK_CACHE_DIR", "")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))
