"""Reading checkpoints written by other libraries."""
