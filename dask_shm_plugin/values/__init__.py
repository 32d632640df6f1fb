"""Represent values as serialized frames in blocks of the arena."""
