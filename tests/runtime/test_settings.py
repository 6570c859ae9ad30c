"""`requanto.settings`: what may be set, and what is refused."""

import copy
import inspect
import os
import subprocess
import sys

import pytest

from requanto.runtime.settings import (
    Settings,
    parse_compiled,
    parse_cpu_arithmetic,
    parse_packing,
    parse_workspace,
    registry_state,
    settings,
)


@pytest.fixture
def own():
    return Settings(workspace_bytes=2**20, pack_on_first_use=True, compiled=None)


@pytest.fixture(autouse=True)
def version_restored():
    """Settings of their own count as the process's for choices."""
    yield
    settings.compiled = settings.compiled


@pytest.mark.parametrize(
    ("name", "near"),
    [("compile", "compiled"), ("workspace_byte", "workspace_bytes"), ("pack_first_use", "pack_on_first_use")],
)
def test_a_name_that_is_none(own, name, near):
    before = dict(own.__dict__)
    with pytest.raises(AttributeError, match=f"no '{name}'; did you mean '{near}'"):
        setattr(own, name, False)
    assert own.__dict__ == before


def test_a_name_like_no_other(own):
    with pytest.raises(AttributeError, match="no 'x'; There are workspace_bytes, pack_on_first_use, compiled"):
        own.x = 1


@pytest.mark.parametrize("value", ["64MB", "64", 64e6, None, True, False, [1]])
def test_bytes_of_another_type(own, value):
    version = registry_state.version
    with pytest.raises(
        TypeError, match=r"workspace_bytes is .*expected a whole number of bytes, such as 64 \* 2\*\*20"
    ):
        own.workspace_bytes = value
    assert own.workspace_bytes == 2**20
    assert registry_state.version == version


@pytest.mark.parametrize("value", [-1, 2**63])
def test_bytes_out_of_range(own, value):
    with pytest.raises(ValueError, match=f"workspace_bytes is {value}, expected"):
        own.workspace_bytes = value
    assert own.workspace_bytes == 2**20


def test_bytes_that_are_taken(own):
    class Index:
        def __index__(self) -> int:
            return 5

    for value, taken in ((0, 0), (2**63 - 1, 2**63 - 1), (Index(), 5)):
        own.workspace_bytes = value
        assert own.workspace_bytes == taken
        assert type(own.workspace_bytes) is int


@pytest.mark.parametrize("name", ["pack_on_first_use", "compiled"])
@pytest.mark.parametrize("value", ["0", "1", "", 0, 1, "False", []])
def test_what_is_no_truth_value(own, name, value):
    before = getattr(own, name)
    with pytest.raises(TypeError, match=f"settings.{name} is .*, expected one of "):
        setattr(own, name, value)
    assert getattr(own, name) is before


def test_only_compiled_may_be_left_open(own):
    own.compiled = None
    with pytest.raises(TypeError, match="pack_on_first_use is None, expected one of True, False"):
        own.pack_on_first_use = None


def test_nothing_is_deleted(own):
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del own.compiled
    assert own.compiled is None


def test_made_with_a_wrong_value():
    with pytest.raises(TypeError, match="compiled is 'no'"):
        Settings(compiled="no")


def test_a_copy_is_checked_too(own):
    other = copy.deepcopy(own)
    assert other == own
    with pytest.raises(TypeError):
        other.workspace_bytes = "1"


def test_choices_follow_what_is_set(own):
    """The same number for the same settings; another one when they are others."""
    versions = []
    for compiled in (True, False, True):
        own.compiled = compiled
        versions.append(registry_state.version)
    assert versions[0] == versions[2] != versions[1]
    registry_state.changed()
    assert registry_state.version not in versions


@pytest.mark.parametrize(("text", "megabytes"), [("", 64), ("64", 64), ("0.5", 0.5), ("0", 0), ("1e3", 1000)])
def test_megabytes_of_the_environment(text, megabytes):
    assert parse_workspace(text) == megabytes * 2**20


@pytest.mark.parametrize("text", ["64MB", "-1", "nan", "inf", "1e300", "a lot"])
def test_megabytes_that_are_none(text):
    with pytest.raises(
        ValueError, match=f"REQUANTO_WORKSPACE_MB is '{text}', expected a number of megabytes without a unit"
    ):
        parse_workspace(text)


def test_packing_of_the_environment():
    assert [parse_packing(text) for text in ("", "1", "0")] == [True, True, False]
    for text in ("no", "false", "2"):
        with pytest.raises(ValueError, match=f"REQUANTO_PACK is '{text}', expected 1 or nothing"):
            parse_packing(text)


def test_kernels_of_the_environment():
    assert [parse_compiled(text) for text in ("", "0", "1")] == [None, False, True]
    with pytest.raises(ValueError, match="REQUANTO_COMPILE is 'yes', expected 1"):
        parse_compiled("yes")
    assert [parse_cpu_arithmetic(text) for text in ("", "auto", "float")] == ["auto", "auto", "float"]
    with pytest.raises(ValueError, match=r"REQUANTO_CPU_ARITHMETIC is 'int8', expected auto \(.*, float"):
        parse_cpu_arithmetic("int8")


def test_arithmetic(own):
    own.cpu_arithmetic = "float"
    for value in ("int8", None, True, "Float"):
        with pytest.raises(ValueError, match=r"cpu_arithmetic is .*, expected one of 'auto', 'float'"):
            own.cpu_arithmetic = value
    assert own.cpu_arithmetic == "float"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("REQUANTO_WORKSPACE_MB", "64MB"),
        ("REQUANTO_PACK", "off"),
        ("REQUANTO_COMPILE", "yes"),
        ("REQUANTO_CPU_ARITHMETIC", "int8"),
    ],
)
def test_a_wrong_environment_is_said_at_the_import(name, text):
    # The module by itself, without torch: it is read at the import of the whole package.
    command = [sys.executable, inspect.getsourcefile(Settings)]
    done = subprocess.run(command, env={**os.environ, name: text}, capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.strip().splitlines()[-1].startswith(f"ValueError: {name} is '{text}', expected")
