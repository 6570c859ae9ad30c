"""GEMMs on a CPU."""
