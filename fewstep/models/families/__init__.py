"""Real models behind one contract: one file a family, and nothing about a family anywhere else."""
