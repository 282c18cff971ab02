"""A FastDeploy source tree on CPU-only Paddle: what has to stand in for CUDA, and its own model run step by step."""
