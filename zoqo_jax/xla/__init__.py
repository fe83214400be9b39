"""What the compiler must be told, large arrays chunk by chunk, and random bits that it fuses."""
