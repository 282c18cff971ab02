"""Speculative decoding: a draft model proposes tokens, the target computes them in one step and keeps what fits."""
