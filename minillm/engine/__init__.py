"""The serving engine: who computes what in a step, the packed step itself, and the record of what happened."""
