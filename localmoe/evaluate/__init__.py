"""Is it worth it: the evaluation protocol and its statistics."""
