"""Runs whose workers come and go: an append-only log is the run, and Ray carries it."""
