"""Pages, figures, tables and lists of runs."""
