"""The README of a saved directory: what it is and how to load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from requanto.config import QuantoConfig

_TEXT = """\
---
library_name: {library}
tags: [requanto, quanto, quantized]
---

# {title}, quantized with Requanto

{counts}

```bash
pip install "requanto[{library}]"
```

```python
import requanto
from {library} import {model_class}

model = {model_class}.from_pretrained("path/to/this/directory")
```

`import requanto` is all that is needed: the configuration is in `config.json`. `model.dequantize()` gives the float model
back, which saves and loads without Requanto.
"""


def write_readme(directory: Path, model: Any, config: QuantoConfig, library: str = "transformers") -> None:
    """Writes ``README.md`` unless the directory has one."""
    path = directory / "README.md"
    if path.exists():
        return
    counts = Counter(text.split()[0].removeprefix("q") for text in config.tensors.values())
    listed = ", ".join(f"{count} weights in {name}" for name, count in counts.most_common())
    title = type(model).__name__
    path.write_text(
        _TEXT.format(library=library, title=title, model_class=title, counts=f"{listed}; the rest is float."),
        encoding="utf-8",
    )
