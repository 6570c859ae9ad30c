"""GEMMs on GPUs, with the Triton kernels of `requanto_kernels`."""
