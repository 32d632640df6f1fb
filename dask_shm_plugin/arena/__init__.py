"""Reserve, seal, attach, release and reclaim blocks."""
