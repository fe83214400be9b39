"""Plans for runs of many workers: a simulation with figures measured on one machine."""
