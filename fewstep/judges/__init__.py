"""Judges of real images: what a vision-language model is asked, and how far it can be trusted."""
