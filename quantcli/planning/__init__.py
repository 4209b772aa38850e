"""What will be written, before a weight is read: the source arranged, a scheme for each tensor, every byte."""
