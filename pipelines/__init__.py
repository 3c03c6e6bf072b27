"""Where mvrec_core runs on Ray: a verb a file."""
