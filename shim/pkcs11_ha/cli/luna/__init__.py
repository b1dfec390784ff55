"""`p11ha luna` and `p11ha import-luna`: for people and scripts that come from Luna's lunacm and vtl."""
