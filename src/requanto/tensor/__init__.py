"""QTensor, the quantized weight: its storage, operators, slicing, merging, and sharing between processes."""
