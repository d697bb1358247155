"""Decoding of one sequence: drafts, commits, sampling, text and its end."""
