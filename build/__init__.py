"""w4a16 checkpoint to engine directory."""
