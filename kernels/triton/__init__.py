"""Triton kernels of the MLP head's denoising loop, one op a file. Shapes are in rows r, columns n and k, trajectories t.

Everything is accumulated in float32, and so are the residual stream h, the state x and the statistics; the operands of the matrix
products and the modulation are in the dtype of the weights. Every kernel masks ragged rows and columns.
"""
