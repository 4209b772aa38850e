"""quantcli: a Hugging Face checkpoint becomes the best possible quantized model, on the hardware one has, with proof."""

__version__ = "0.1.0"
