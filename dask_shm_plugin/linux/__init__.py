"""System calls, and facts that the kernel reports."""
