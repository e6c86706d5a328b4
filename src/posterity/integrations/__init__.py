"""Thin bridges to other packages. Each imports its package only where it needs it."""
