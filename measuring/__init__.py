"""Measure this project's own training for doctor and its ladder: one probe, one roofline, one verdict."""
