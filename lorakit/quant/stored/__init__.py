"""Quantised weights as checkpoints store them, read as the values that they stand for; one layout a
file, a row each in `table.py`.
"""
