"""Runs to look at: their history, curves, lists, and what differs between them."""
