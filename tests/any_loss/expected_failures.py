"""Losses that fail today, by name, with what they raise; nothing else in the catalogue may."""

FAILURES: dict[str, str] = {}
