"""Benchmarks: hanse beside the raw PyTorch loop, on work that is checked to be the same."""
