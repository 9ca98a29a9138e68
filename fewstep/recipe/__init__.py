"""What is asked (schema, load) and what will happen (plan). Imports no torch."""
