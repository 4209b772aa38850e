"""Which numbers can be stored: one grid a file."""
