"""The thin edges: one module a library. `register()` hooks into whichever of them is installed."""
