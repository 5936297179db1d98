"""Metric writers, throughput, provenance."""
