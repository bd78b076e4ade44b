"""Runs compared: what a folder holds, grouped and tested against a baseline, as tables, figures and one page."""
