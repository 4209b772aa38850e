"""Tokenizers as llama.cpp has them, made from a Hugging Face folder's files."""
