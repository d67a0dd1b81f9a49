"""Figures: what they show, drawn interactively in pages and as files for papers."""
