"""Beside a network: its frozen outputs, computed once; small maps as matrix products; where a class comes from."""
