"""The course: what teaches. It imports the engine; the engine knows nothing of it."""
