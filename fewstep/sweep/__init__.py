"""Studies: a base recipe with named variants and seeds, run cell by cell. Imports no torch."""
