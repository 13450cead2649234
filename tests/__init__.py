"""Tests. A package, so that commands and other processes can import what the tests share."""
