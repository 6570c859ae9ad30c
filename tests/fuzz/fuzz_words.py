"""What the mutations write: hostile names and values, words and types for the lines of a table."""

from __future__ import annotations

#: Names that a regular expression, a path or an attribute lookup must not take at their word.
HOSTILE_NAMES = (
    *(
        "lm_head.(x+x+)+y",
        "model.(a|a)*b",
        "lm_head.weight)|(.*",
        "[",
        "*",
        "(?P<g0>.)",
        "\\",
        "",
        ".",
        "..",
        "a..b",
        "../x",
    ),
    *(
        "__class__",
        "lm_head.__class__",
        "model.__dict__.weight",
        "weight",
        "model.layers.0",
        "x" * 100_000,
        "\0",
        "\ud800",
    ),
    *("e\u0301", "model.layers.0.mlp.up_proj.weight ", "*" * 60 + "b", "[!" + "a" * 1000, "lm_head.forward"),
    "model.embed_tokens",
)
#: Values for any key of a config.
HOSTILE_VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        10**30,
        -(10**30),
        0.5,
        float("nan"),
        float("inf"),
        "",
        "no",
        "True",
        "False",
        "none",
    ),
    *("auto", "int4", "qint4", "int9", "nf4", "hqq", "gptq", [], ["int4"], [None], [[]], {}, {"a": 1}, {"*": None}),
    *({"*": {"symmetric": "no"}}, {"": "int4"}, [1, 2, 3], "x" * 10_000, {"weights": {"weights": "int4"}}),
    {"*": {"weights": ["int4"]}},
)
#: Words for a line of the table.
WORDS = (
    *(
        f"group={n}"
        for n in (7, 0, -8, 1, 2, 8, 16, 32, 64, 999999999999, "x", "", "\u00b3\u00b2", "6_4", "+64", "064")
    ),
    *("affine", "affine=1", "axis=0", "axis=1", "axis=-1", "axis=99", "transposed", "tall", "group=64 group=64"),
    *(f"activation={kind}" for kind in ("nf4", "qint8", "int4", "qfloat8_e4m3fn", "quint8", "")),
    *(f"rank={n}" for n in (0, 1, -1, 4, 99999999)),
    *(f"scales={n}" for n in (4, 6, 8, 16, 3)),
    *(f"rotation={n}" for n in (2, 3, 32, 64, -2, 99999999999)),
    *("columns", "zeros", "signed", "order", "signed=1", "order=0", "zeros zeros"),
    *(f"block={n}" for n in (32, 64, 96, 0, -64, 99999999999, "x", "")),
)
TYPES = (
    *("qint2", "qint3", "qint4", "qint8", "quint4", "quint8", "qnf4", "qfp4", "qfloat8_e4m3fn", "qfloat8_e5m2"),
    *("qcodebook4", "qint9", "int4", "", "qfloat8"),
)


class NotPossible(Exception):
    """The checkpoint has nothing that this mutation changes."""
