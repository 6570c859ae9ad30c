"""Settings of the process: few, and none that changes a result.

requanto.settings.workspace_bytes = 256 * 2**20
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Settings:
    """What may be set, by attribute, at any time.

    Attributes:
        workspace_bytes: the most memory that one thread keeps to dequantize weights into
            (environment: REQUANTO_WORKSPACE_MB; 64 MB unless set).
        pack_on_first_use: on a CPU, reorder the codes of a layer for its kernel at the first product. The reordered
            form replaces the stored one, and the stored one comes back when it is asked for.
            (environment: REQUANTO_PACK=0 turns it off; `requanto.prepare(model)` packs all the same.)
        compiled: on a CPU, use kernels that torch.compile makes where they are faster: float8 (e4m3), and int4, int3 and
            int2 with 24 rows and more, in bfloat16. The first use takes 15 to 30 s and a C++ compiler
            (`requanto.linear.compiled`).
            (environment: REQUANTO_COMPILE=1)
    """

    workspace_bytes: int = int(float(os.environ.get("REQUANTO_WORKSPACE_MB", "64")) * 2**20)
    pack_on_first_use: bool = os.environ.get("REQUANTO_PACK", "1") != "0"
    compiled: bool = os.environ.get("REQUANTO_COMPILE", "0") == "1"


settings = Settings()
