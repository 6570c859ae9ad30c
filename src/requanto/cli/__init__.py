"""The command line: ``requanto quantize``, ``inspect``, ``convert``, ``eval``, ``compare``, ``tune``, ``kernels``."""

from requanto.cli.app import app, main

__all__ = ["app", "main"]
