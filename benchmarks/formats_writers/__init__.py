"""Writers of other libraries' checkpoints for formats.py; they run in the Python that has those libraries.

    python -m formats_writers WRITER OUT BASE SETTING        # WRITER: MODULE.FUNCTION of this package, SETTING: JSON

A writer fills OUT with ``model/`` (the checkpoint, or single files beside it) and returns what the library itself
dequantizes: name of a weight -> float tensor. From them, the float model BASE is run in float32; its outputs are what every
reader's are compared with (``outputs.safetensors``, ``reference.safetensors``, ``written.json``).
"""
