"""Tests. A package, so that spawned processes can import what the tests share."""
