"""Base weights: how they are read, adapted for one operation, merged into, and written."""
