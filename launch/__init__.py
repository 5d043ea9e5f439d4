"""The command line, its configuration and the composition of the other packages. Nothing imports it but `quire`."""
