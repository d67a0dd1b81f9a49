"""Pages, figures and tables of measured networks."""
