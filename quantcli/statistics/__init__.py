"""What is known of the inputs of a model's linears: gathered, stored in a file, and what follows from it."""
