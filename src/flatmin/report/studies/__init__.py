"""Studies to look at: tables, notes and figures."""
