"""One file per operation; each has the declaration `OP`."""
