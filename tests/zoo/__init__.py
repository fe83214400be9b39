"""Other people's JAX models, each used as its documentation uses it, in codes."""
