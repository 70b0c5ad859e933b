"""One probe, one roofline, one verdict: what doctor and compare --ladder measure of this project's own training."""
