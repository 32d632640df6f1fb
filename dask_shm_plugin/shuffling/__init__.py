"""P2P shuffles and rechunks through the arena."""
