#!/bin/sh
# Builds the CUDA part of the extension module alone, into $1, for checks on a machine without the whole toolchain.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
out=$1
mkdir -p "$out"
python3 - "$root" "$out" <<'PY'
import glob, importlib.util, os, subprocess, sys, sysconfig
import nanobind
root, out = sys.argv[1:]
jaxlib = list(importlib.util.find_spec("jaxlib").submodule_search_locations)[0]
with open(f"{out}/module.cc", "w") as f:
    f.write('#include "cuda/handlers.h"\nNB_MODULE(_ext, m) { mpk::cuda::bind(m); m.def("registrations", [] { return nanobind::dict(); }); }\n')
base = os.path.dirname(nanobind.__file__)
sources = [f"{out}/module.cc", f"{base}/src/nb_combined.cpp", *glob.glob(f"{root}/ffi/cuda/*.cc")]
include = [f"{root}/ffi", f"{jaxlib}/include", f"{base}/include", f"{base}/ext/robin_map/include", sysconfig.get_paths()["include"]]
flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w", *[f"-I{i}" for i in include]]
subprocess.run(["g++", *flags, *sources, "-o", f"{out}/_ext.so", "-ldl"], check=True)
PY
