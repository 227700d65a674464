"""Merges that are killed, run out of disk, or fail to write; run by hand, in short by pytest."""
