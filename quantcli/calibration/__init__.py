"""What a run learns from text: the walk that measures, and the checks of the data it is given."""
