"""What is known to fail, so that the tests say when it no longer does: by model, the message.

A model that starts to pass fails its test until it is taken out of here.
"""

__all__ = ["FAILS"]

FAILS: dict[str, str] = {}
