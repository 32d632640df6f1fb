"""Let nannies, workers and clients take part in sharing: the three roles of a process."""
