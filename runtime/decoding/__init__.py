"""How one sequence decodes: drafts, commits, sampling, text and its end."""
