"""A run on real models: their pipelines, prompts as a domain, and the networks as a cast."""
