"""`headrace map`: a batch from an input file, resumed by the same command, with its output."""
