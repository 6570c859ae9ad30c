"""What a user asks for: the configuration, budgets, and the plan that follows for a model."""
