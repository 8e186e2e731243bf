"""Benchmarks: each module runs in one command, ``python -m bench.NAME``."""
