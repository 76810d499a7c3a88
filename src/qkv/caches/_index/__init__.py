"""Searching stored keys: maximum inner products, exactly or approximately."""
