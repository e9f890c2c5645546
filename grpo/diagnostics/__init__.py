"""What a run tells people: checks before it, a display during it, a report after it."""
