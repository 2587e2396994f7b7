"""Adapters together: several active at once, weighted combinations of them, and what they have in common."""
