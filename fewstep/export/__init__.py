"""A finished student as files that stock tools read: diffusers, ComfyUI, and a card for people.

Nothing here trains or samples; what is written is checked against the tools' own code in tests.
"""
