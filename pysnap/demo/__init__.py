"""The demonstration behind `python -m pysnap demo`; the library itself imports nothing of it."""
