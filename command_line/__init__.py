"""Turn the arguments of a command line into options: the values that each accepts, and their groups."""
