"""One small script a claim; see docs/experiments.md."""
