"""The build: checkpoint to engine directory."""
