"""The bundled lab: a procedural world, its judge and its teachers: the paper on a laptop."""
