"""Maths that several objectives share unchanged."""
