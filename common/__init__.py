"""What every package stands on: errors, progress, checked JSON, atomic folders, and facts about this machine."""
