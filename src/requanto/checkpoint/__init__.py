"""Requanto's checkpoint format, and writing checkpoint directories so that an interrupted save loses nothing."""

from requanto.checkpoint.format import CheckpointError, flatten, parse_spec, rebuild, spec_text, table_of

__all__ = ["CheckpointError", "flatten", "parse_spec", "rebuild", "spec_text", "table_of"]
