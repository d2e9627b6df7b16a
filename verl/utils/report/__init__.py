"""Numbers for people: validation reports."""
