"""Proposers: who guesses the next tokens. The engine checks the guesses (`minillm.engine.verify`)."""
