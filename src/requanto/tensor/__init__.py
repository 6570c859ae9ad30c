"""The quantized tensor: what it stores, which operators it has, how it is cut, merged and shared between processes."""
