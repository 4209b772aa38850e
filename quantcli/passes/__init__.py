"""How a layer is changed towards its grid: one method a file."""
