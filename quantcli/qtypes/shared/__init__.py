"""What several number formats share."""
