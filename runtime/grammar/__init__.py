"""Grammars: what the tokens of an answer must match, compiled and matched by llguidance."""
