"""Our checkpoint format, and how a directory is written so that an interruption loses nothing."""

from requanto.checkpoint.format import CheckpointError, flatten, parse_spec, rebuild, spec_text, table_of

__all__ = ["CheckpointError", "flatten", "parse_spec", "rebuild", "spec_text", "table_of"]
