"""The demo model: its text, its tasks, its PyTorch definition and its training."""
