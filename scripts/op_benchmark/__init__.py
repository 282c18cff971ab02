"""Parts of scripts/bench_ops.py."""
