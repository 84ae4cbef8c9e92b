"""Pretraining of RoFormerV2-family encoders on DeepSpeed. Imports nothing heavy by itself."""

__version__ = "0.1.0"
