"""What scripts/bench_gpu.py measures: a file for each section, and the rooms they share."""
