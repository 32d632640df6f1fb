"""Check, read and replace private names of ``distributed``."""
