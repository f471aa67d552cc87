"""Objects of a store afar: read, and kept here."""
