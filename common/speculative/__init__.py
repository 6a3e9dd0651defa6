"""Guessing tokens that a step then verifies."""
