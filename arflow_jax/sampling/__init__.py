"""Images by index from any branch, and the files they are written to."""
