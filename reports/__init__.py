"""What a run looks like: the live display, and the report made from run folders alone."""
