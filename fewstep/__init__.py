"""fewstep distils a multi-step flow-matching image model into a student of a few evaluations."""

__version__ = "0.1.0"
