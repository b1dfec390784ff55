"""What each PKCS#11 function and mechanism is: the one table everything else is drawn from."""
