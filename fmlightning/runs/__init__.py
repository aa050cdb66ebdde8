"""What lies on disk, without torch."""
