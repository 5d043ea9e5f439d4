"""Models that the project makes itself."""
