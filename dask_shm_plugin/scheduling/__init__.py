"""The scheduler's view of nodes: where tasks run, and which replicas stay."""
