"""CPU kernels compiled ahead of time by AOTInductor."""
