"""`p11ha demo-menu`: any PKCS#11 module tried by hand, by the numbers that CKDemo's users know."""
