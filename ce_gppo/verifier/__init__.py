"""Verifiers: one for each source, finding the answer in a response, comparing answers, and killable processes."""
