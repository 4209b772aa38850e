"""The GGUF file itself: header, metadata fields, tensors, splits."""
