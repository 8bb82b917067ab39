"""Before JAX starts: eight CPU devices, threads enough for their collectives, and no user's program cache."""

import os

os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_MPK_CACHE_DIR", "")
os.environ.setdefault("JAX_MPK_CHOOSE", "0")  # no name means a megakernel; the tests of choosing set it
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


def _gpu() -> bool:
    """An NVIDIA GPU with a driver, asked without starting JAX."""
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        return False


GPU = _gpu()


def pytest_report_header(config):
    return "GPU: found, tests/device run" if GPU else "GPU: none, tests/device are deselected"


def pytest_collection_modifyitems(config, items):
    if not GPU:
        device = [i for i in items if i.get_closest_marker("device")]
        config.hook.pytest_deselected(items=device)
        items[:] = [i for i in items if not i.get_closest_marker("device")]
