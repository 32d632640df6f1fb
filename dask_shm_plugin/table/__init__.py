"""The table of an arena: members, blocks and references, in any writable buffer, without system calls."""
