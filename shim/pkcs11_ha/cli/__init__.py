"""The command p11ha: what operators ask of a group."""
