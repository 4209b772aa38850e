"""Importance matrices: llama.cpp's files, and what they state about a model's weights."""
