"""Readers that also run alone on a board: Python 3.8, the standard library, copied together into one flat folder."""
