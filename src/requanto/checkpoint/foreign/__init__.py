"""Reading checkpoints that other libraries wrote."""
