"""The mappings of blocks in the address space of a process."""
