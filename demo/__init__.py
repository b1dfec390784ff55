"""A group of real tokens that dies and comes back before your eyes, and the program that signs meanwhile."""
