"""Statistics of the inputs of a model's linears: gathered, stored in a file, and evaluated."""
