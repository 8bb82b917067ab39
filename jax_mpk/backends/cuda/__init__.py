"""The CUDA backend: bodies printed as one kernel, the program's tables, NVRTC, and the custom call (`backend`)."""
