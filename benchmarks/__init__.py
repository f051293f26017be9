"""Measurements of Lory and of what people would use instead; results lie in `results`."""
