"""The engine directory: its manifest, its files and their checks. The builder writes it, the runtime reads it."""
