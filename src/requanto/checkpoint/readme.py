"""The README.md of a saved model: what was quantized and how to load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from requanto.config.config import QuantoConfig

#: README files with this line are overwritten. The text must not change: existing files are recognized by it.
_MARK = "<!-- Written anew at every save: delete this line to keep a text of your own. -->"

_TEXT = """\
---
library_name: {library}
tags: [requanto, quanto, quantized]
---
{mark}

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


def written_by_user(readme: Path) -> bool:
    """Whether there is a README that a user wrote, or whose mark a user deleted."""
    return readme.is_file() and _MARK not in readme.read_text(encoding="utf-8", errors="replace")


def keep_readmes(new: Path, target: Path) -> None:
    """Deletes every README below ``new`` that :func:`write_readme` wrote, if the user has written one in its place."""
    for path in new.rglob("README.md"):
        if written_by_user(target / path.relative_to(new)) and not written_by_user(path):
            path.unlink()


def write_readme(directory: Path, model: Any, config: QuantoConfig, library: str = "transformers") -> None:
    """Writes ``README.md``, unless there is one that the library or a user wrote."""
    path = directory / "README.md"
    if path.exists():
        return
    counts = Counter(text.split()[0].removeprefix("q") for text in config.tensors.values())
    listed = ", ".join(f"{count} weights in {name}" for name, count in counts.most_common())
    title = type(model).__name__
    path.write_text(
        _TEXT.format(
            library=library, title=title, mark=_MARK, model_class=title, counts=f"{listed}; the rest is float."
        ),
        encoding="utf-8",
    )
