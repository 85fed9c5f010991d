"""Jobs whose workers own the parameters and reduce among themselves."""
