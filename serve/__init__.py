"""The HTTP service on Ray Serve: `python -m serve --checkpoint DIR`."""
