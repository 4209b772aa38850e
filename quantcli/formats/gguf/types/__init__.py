"""GGUF file types: which tensor of a model gets which block type."""
