"""Data files: rows, columns, cleaning and splits."""
