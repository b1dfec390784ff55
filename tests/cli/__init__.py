"""The command p11ha."""
