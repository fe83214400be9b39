"""What a model, a grid or a run is like: nothing here trains."""
