"""The traps of naming, experts and ties, one tiny model for each, held against algebra on disk."""
