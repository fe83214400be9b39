"""Other people's JAX models, each used as its own documentation uses it, and what is asked of them."""
