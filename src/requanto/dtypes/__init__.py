"""Types of weights, their codebooks, and how codes below 8 bits are packed into bytes."""
