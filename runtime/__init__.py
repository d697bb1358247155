"""Engine directory to text."""
