"""What a measurement was made on: hardware, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax_mpk")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NPROC")


def describe() -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers; what cannot be found out is None."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device.device_kind if device.platform != "cpu" else cpu_name(),
        "platform": device.platform,
        "gpus": gpus(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "usable": threads(), "load": os.getloadavg()[0]},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "environment": {k: v for k, v in os.environ.items() if k in VARIABLES or k.startswith("JAX_MPK_")},
    }


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def gpus() -> list[dict[str, str]] | None:
    """The GPUs as ``nvidia-smi`` reports them, or None where there is none."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    if not text:
        return None
    return [dict(zip(GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines()]


def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` if tracked files differ from it; in a copy without its history,
    what the environment variable GPU_CHECK_COMMIT says."""
    if said := os.environ.get("GPU_CHECK_COMMIT"):
        return said
    root = str(Path(__file__).parent)
    head = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head or None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
