"""The real models of the examples, for tests: `smollm2_dir()` and `minilm_dir()`. There is one implementation, theirs."""

import importlib.util
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[1] / "examples" / "real_models.py"

# Under a name of its own: this module is called real_models too.
_spec = importlib.util.spec_from_file_location("requanto_example_models", _SOURCE)
if _spec is None or _spec.loader is None:
    raise ImportError(f"integration tests take the real models from {_SOURCE}, which is not there")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

ModelNotAvailable = _module.ModelNotAvailable
smollm2_dir = _module.smollm2_dir
smollm2_gguf = _module.smollm2_gguf
minilm_dir = _module.minilm_dir
