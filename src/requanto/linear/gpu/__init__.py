"""Matrix products on GPUs, by the Triton kernels of `requanto_kernels`."""
