"""CE-GPPO (arXiv 2509.20712): the parts of train.py. CHANGELOG.md says what has changed."""

__version__ = "1.0.0"
