"""Fuzzers of the boundary, of both ends of the worker protocol, and of mechanism parameters, with their corpus."""
