"""How parts lie in a file: one dialect a file."""
