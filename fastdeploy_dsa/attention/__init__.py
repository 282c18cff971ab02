"""Attention backends: each owns its cache layout and the calls over it."""
