"""Throughput and latency of a loaded engine or of a server, under a given load."""
