"""Two versions of the package against each other."""
