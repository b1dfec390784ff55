"""pkcs11-ha: a high-availability layer for PKCS#11 tokens."""

__version__ = "0.1.0"
