"""Examples that ship with the package, so that `headrace demo` needs nothing else."""
