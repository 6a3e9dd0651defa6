"""The HTTP API, one small file per family of paths."""
