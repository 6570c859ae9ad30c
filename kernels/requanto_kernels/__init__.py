"""Triton kernels for low-bit matrix multiplication. Plain tensors in and out; imports torch and triton only."""
