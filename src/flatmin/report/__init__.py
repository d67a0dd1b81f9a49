"""Pages, figures and tables of runs, studies and measurements."""
