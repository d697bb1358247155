"""What every package uses: errors, progress, checked JSON, atomic folders, and facts about this machine."""
