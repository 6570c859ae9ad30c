"""Fixtures of the published package's tests: they load it as its users do, never by its name on the path."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = "requanto/requanto-kernels"


def load(variant: Path) -> ModuleType:
    """The package in this folder, under the unique name in its metadata, as `kernels.get_kernel` loads a download."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kernel() -> ModuleType:
    """The package: a build in the folder $REQUANTO_KERNELS_BUILD, else from the hub (or from $LOCAL_KERNELS)."""
    if folder := os.environ.get("REQUANTO_KERNELS_BUILD"):
        return load(Path(folder))
    return pytest.importorskip("kernels").get_kernel(REPOSITORY, version=0, trust_remote_code=True)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU where Triton's interpreter runs the kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
