"""One sample on several ranks."""
