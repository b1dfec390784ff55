"""Tests of pkcs11-ha: unit tests of its core, and real tokens behind the built module."""
