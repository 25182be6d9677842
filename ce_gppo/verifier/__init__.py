"""Verifiers: which one a source has, where an answer stands, whether it is right, and processes for what may hang."""
