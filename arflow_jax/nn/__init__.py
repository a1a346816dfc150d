"""Layers that more than one branch uses."""
