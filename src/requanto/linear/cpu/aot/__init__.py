"""CPU kernels compiled by AOTInductor, with their cache on disk."""
