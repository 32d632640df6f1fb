"""How the members of an arena find each other, and which arenas this process has joined."""
