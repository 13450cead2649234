"""How data/demo was made."""
