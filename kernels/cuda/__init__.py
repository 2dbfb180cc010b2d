"""CUDA C++ kernels: sources for nvcc and NVRTC."""
