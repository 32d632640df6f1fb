"""The scheduler's view of nodes: where tasks run, which replicas stay, and what a death loses."""
