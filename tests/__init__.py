"""Tests. A package, so that the benchmarks and spawned processes can import the textbook formulation."""
