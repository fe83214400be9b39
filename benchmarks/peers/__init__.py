"""Contestants of `benchmarks.beside`, a process each, which call one thing again and again.

`turns.py` is what a process is told and answers; `ours.py` is this library, `llama_cpp.py` and
`pytorch.py` are what a user would run instead. Each of these three needs packages of its own.
"""
