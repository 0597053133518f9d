"""Pure functions: the mathematics of the memory, without modules or state."""
