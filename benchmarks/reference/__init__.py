"""The textbook forms that benchmarks and tests compare with."""
