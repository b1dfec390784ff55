"""How fast the module is: `make bench`."""
