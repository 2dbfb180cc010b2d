"""Device code, installed as disa_fast.kernels; what launches it is in disa_fast/backends."""
