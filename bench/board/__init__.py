"""Readers that also run alone on a board: Python 3.8, copied together into one flat folder.

The readers of state and energy need the standard library alone; sampling needs numpy, and what runs an artifact its
runtime.
"""
