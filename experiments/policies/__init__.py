"""Policies in few-bit codes, trained by the returns of their episodes alone."""
