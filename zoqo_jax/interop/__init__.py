"""Other people's files as codes, and back; each module reads and writes one kind."""
