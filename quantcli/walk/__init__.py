"""The run over the layers of a model: to quantize it, or to evaluate it."""
