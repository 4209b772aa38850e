"""A model as GGUF has it: names of tensors, metadata, configuration."""
