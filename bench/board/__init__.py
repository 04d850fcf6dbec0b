"""What a board runs to measure: Python 3.8, its standard library, numpy and a runtime; nothing of this package."""
