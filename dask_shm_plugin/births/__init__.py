"""Arrays that are born in the arena: NumPy allocates them in drafts, which publishing seals without a copy."""
