"""Text to calibrate and to measure on: datasets, records and conversations, cut into windows of tokens."""
