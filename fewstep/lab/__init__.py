"""The bundled lab: a procedural world, its judge and its teachers, so that the paper runs on a laptop."""
