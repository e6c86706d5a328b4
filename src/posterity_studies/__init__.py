"""Experiments with posterity, and its command line."""
