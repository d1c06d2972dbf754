"""Data files to rows: a module for each kind of file, and for what they share."""
