"""Benchmarks: each answers one question, prints a table and writes JSON beside the machine, versions and commit."""
