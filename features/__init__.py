"""Additions to a network: frozen outputs computed once, faster layers for CPUs, class activation maps, means."""
