"""Importance matrices: llama.cpp's files, and what they say of a model's weights."""
