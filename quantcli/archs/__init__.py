"""What a model's tensors mean: one literal a family."""
