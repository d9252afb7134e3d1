"""The packages that are pinned, and their audit."""
