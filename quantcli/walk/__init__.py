"""The walk over the layers: from a checkpoint to a quantized one, and over a model to measure it."""
