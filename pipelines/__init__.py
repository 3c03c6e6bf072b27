"""What runs on Ray: one file a verb, each `python -m pipelines.<verb>`."""
