"""A model to read: its files, where tensors lie in them, and views of it under other names."""
