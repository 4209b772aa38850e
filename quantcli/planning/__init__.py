"""Planning: which tensor gets which scheme, and every byte of the output, before a weight is read."""
