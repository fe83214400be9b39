"""What is known to fail, so that the tests say when it no longer does: by model, the message.

"run NAME" is a model that is traced and does not pass when it runs. One that passes fails its test
until it is taken out of here.
"""

__all__ = ["FAILS"]

FAILS: dict[str, str] = {}
