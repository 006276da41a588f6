"""What nobody forks: processes, run folder and state, flags, rows in chunks, checks of what users bring."""
