"""What IVON costs beside AdamW: `python -m benchmarks`."""
