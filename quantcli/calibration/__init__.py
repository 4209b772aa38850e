"""Calibration: measures what linears read on text, and checks the data that a run is given."""
