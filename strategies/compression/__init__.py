"""Vectors as few bytes, and back from bytes that anybody may have written. Pure functions; stages use them."""
