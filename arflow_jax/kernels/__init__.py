"""Accelerated operators, one folder each. Knows no layer."""
