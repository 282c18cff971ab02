"""What tests and benchmarks share: cases, poison, comparisons, and one interface over all implementations."""
