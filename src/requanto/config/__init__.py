"""The configuration, budgets, and the plan of which weights of a model are quantized."""
